"""A module of another package that cannot be imported, as one that was not written to its end."""

raise NameError("name 'pydantic' is not defined")
