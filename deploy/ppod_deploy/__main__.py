"""`python -m ppod_deploy` is the `ppod` command."""

from ppod_deploy.cli import main

if __name__ == "__main__":
    main()
