"""`python -m service` is `mlxd`."""

from service.cli import main

if __name__ == "__main__":
    main()
