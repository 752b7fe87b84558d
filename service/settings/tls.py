"""The server's side of TLS, from the settings' certificate."""

from __future__ import annotations

import ssl

from service.settings.groups import ServerSettings
from service.settings.private import ConfigurationError


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with the configured certificate, if there is one. Raises ConfigurationError."""
    if settings.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(
            f"server.tls_certificate, server.tls_key: cannot be used: {error.strerror or error}"
        ) from None
    return context
