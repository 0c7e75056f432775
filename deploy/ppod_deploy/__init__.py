"""ppod's launcher and command line: starts services and trainer, locally or on Kubernetes."""
