"""The tables as they are now. How a database gets there is `migrations.py`; a test keeps the two equal.

Times are float seconds since the epoch. The same types on SQLite and PostgreSQL.
"""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("kid", sa.Text, primary_key=True),
    sa.Column("principal", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("models", sa.JSON(none_as_null=True)),
    sa.Column("networks", sa.JSON(none_as_null=True)),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("pepper_version", sa.Integer, nullable=False),
    sa.Column("created_at", sa.DOUBLE_PRECISION, nullable=False),
    sa.Column("not_before", sa.DOUBLE_PRECISION),
    sa.Column("expires_at", sa.DOUBLE_PRECISION),
    sa.Column("revoked_at", sa.DOUBLE_PRECISION),
    sa.Column("last_used_at", sa.DOUBLE_PRECISION),
    sa.Column("rotated_to", sa.Text),
)

DENIED = sa.Table(
    "denied",
    METADATA,
    sa.Column("issuer", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, primary_key=True),
    sa.Column("expires_at", sa.DOUBLE_PRECISION, nullable=False),
    sa.Column("created_at", sa.DOUBLE_PRECISION, nullable=False),
)

AUDIT = sa.Table(
    "audit",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.DOUBLE_PRECISION, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("previous_hash", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)

REVISIONS = sa.Table(
    "revisions",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

USAGE = sa.Table(
    "usage",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("at", sa.DOUBLE_PRECISION, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("principal", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("queue_seconds", sa.DOUBLE_PRECISION),
    sa.Column("time_to_first_token", sa.DOUBLE_PRECISION),
    sa.Column("duration_seconds", sa.DOUBLE_PRECISION, nullable=False),
    sa.Column("finish_reason", sa.Text, nullable=False),
    sa.Index("usage_at", "at"),
    # With the tokens, so that a quota is summed without a look at the rows.
    sa.Index("usage_principal_at", "principal", "at", "prompt_tokens", "completion_tokens"),
)

SCHEMA_VERSION = sa.Table(
    "schema_version",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("applied_at", sa.DOUBLE_PRECISION, nullable=False),
)
