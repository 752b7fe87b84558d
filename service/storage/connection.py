"""What work is given, by name for the layers above, which do not import sqlalchemy."""

from sqlalchemy import Connection

__all__ = ["Connection"]
