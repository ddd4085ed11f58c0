"""Certificates for TLS on loopback, as a user would have made them."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def certificates(folder: Path) -> dict[str, Path]:
    """An authority and a certificate of it for 127.0.0.1, as options of the command line."""
    now = datetime.datetime.now(datetime.timezone.utc)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    names = {
        name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test {name}")]) for name in keys
    }

    def certified(name: str, extension: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(names["authority"], names[name], keys[name].public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        builder = builder.add_extension(extension, critical=False)
        made = builder.sign(keys["authority"], hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    contents = {
        "tls_ca": certified("authority", x509.BasicConstraints(ca=True, path_length=None)),
        "tls_certificate": certified("server", x509.SubjectAlternativeName([address])),
        "tls_key": keys["server"].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    }
    for name, content in contents.items():
        (folder / f"{name}.pem").write_bytes(content)
    return {name: folder / f"{name}.pem" for name in contents}
