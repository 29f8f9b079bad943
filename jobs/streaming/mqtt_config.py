"""Configuration of a connection to an MQTT broker."""

from __future__ import annotations

import os
import ssl
from typing import Annotated

from pydantic import Field, model_validator

from simmatch.config import ConfigError, Frozen, PositiveFloat, PositiveInt
from simmatch.documents import shortened


class TlsConfig(Frozen):
    """An encrypted connection. `tls: {}` trusts the certificate authorities of the system.

    >>> TlsConfig(ca="ca.pem").certificate is None
    True
    """

    ca: str | None = None
    """File of the certificate authority that the broker's certificate has to be of, PEM. None: those of the system."""

    certificate: str | None = None
    """File of the client's own certificate, PEM, where the broker asks for one."""

    key: str | None = None
    """File of its private key, PEM, without a passphrase. None: in the file of the certificate."""

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        if self.key is not None and self.certificate is None:
            raise ValueError("expected a certificate with key, got none")
        return self

    def context(self, key: str) -> ssl.SSLContext:
        """What the connection is made with; `key` names this configuration in messages.

        Raises
        ------
        ConfigError
            A file cannot be read.
        """
        context = ssl.create_default_context()
        for name, file in (("ca", self.ca), ("certificate", self.certificate)):
            try:
                if file is not None and name == "ca":
                    context = ssl.create_default_context(cafile=file)
                elif file is not None:
                    context.load_cert_chain(file, self.key, password="")
            except (OSError, ValueError) as error:
                reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
                raise ConfigError(f"{key}.{name}: expected a file in PEM, got {file}: {shortened(reason)}") from None
        return context


class MqttConfig(Frozen):
    """A broker, and who asks it.

    >>> MqttConfig(host="broker.example", tls=TlsConfig()).address
    'broker.example:8883'
    """

    host: Annotated[str, Field(pattern=r"^[\w.:-]+$", max_length=253)]
    """Name or address of the broker."""

    port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """None: 8883 with `tls`, else 1883."""

    tls: TlsConfig | None = None
    """None: nothing is encrypted; for a broker on the same machine."""

    user: str | None = None
    password_variable: str | None = None
    """The environment variable that holds the password, such as MQTT_PASSWORD; the password itself is nowhere in a
    configuration."""

    keepalive_s: Annotated[int, Field(gt=0, lt=65536)] = 30
    """After one and a half times as long without a sign of life, either side takes the connection for lost."""

    connect_timeout_s: PositiveFloat = 10.0
    """Longest wait for an answer while connecting."""

    longest_pause_s: PositiveInt = 30
    """Between two attempts to connect: 1 s, twice as long each time, at most this."""

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port or (1883 if self.tls is None else 8883)}"

    @model_validator(mode="after")
    def _password_of_somebody(self) -> MqttConfig:
        if self.password_variable is not None and self.user is None:
            raise ValueError("expected user with password_variable, got none")
        return self

    def password(self, key: str) -> str | None:
        """From the environment; `key` names this configuration in messages.

        Raises
        ------
        ConfigError
            There is no such variable.
        """
        if self.password_variable is None:
            return None
        if not (password := os.environ.get(self.password_variable)):
            raise ConfigError(
                f"{key}.password_variable: expected a variable that holds a password, got {self.password_variable}, "
                "which is not set"
            )
        return password
