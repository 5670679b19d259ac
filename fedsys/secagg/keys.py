"""Keys, what is made of them, and nothing else: all of it by the library ``cryptography``.

X25519 for what two clients agree on, HKDF-SHA256 for a key of one purpose, ChaCha20 for masks,
ChaCha20-Poly1305 for what passes the server sealed. Every key serves once, so nonces are zero.
"""

import hashlib
import secrets

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsys.secagg.quantise import Field, field

KEY_BYTES = 32
SESSION_BYTES = 16
_SEAL, _MASK, _SELF, _COMMIT = b"seal", b"mask", b"self", b"commit"


def fresh(size: int = KEY_BYTES) -> bytes:
    """Return random bytes: a private key, the seed of a mask, the name of a session."""
    return secrets.token_bytes(size)


def private(raw: bytes) -> X25519PrivateKey:
    """Return the private key of its bytes, which takes as long as an agreement."""
    return X25519PrivateKey.from_private_bytes(raw)


def public(key: X25519PrivateKey) -> bytes:
    """Return the public key of a private one."""
    return key.public_key().public_bytes_raw()


def sealing_keys(
    key: X25519PrivateKey, own: bytes, peer: bytes, session: bytes
) -> tuple[bytes, bytes]:
    """Return the keys to seal by for a peer, and to unseal by what comes from it.

    ``own`` is the public key of ``key``. Raises ``ValueError`` when ``peer`` is no public key.
    """
    agreed = _agree(key, peer)
    return _derive(agreed, session, _SEAL + peer), _derive(agreed, session, _SEAL + own)


def mask_key(key: X25519PrivateKey, peer: bytes, session: bytes) -> bytes:
    """Return the key of the mask that two clients share, the same at either.

    Raises ``ValueError`` when ``peer`` is no public key.
    """
    return _derive(_agree(key, peer), session, _MASK)


def self_key(seed: bytes, session: bytes) -> bytes:
    """Return the key of the mask that is a client's own."""
    return _derive(seed, session, _SELF)


def commitment(seed: bytes, session: bytes) -> bytes:
    """Return what tells a right ``seed`` from a wrong one, and nothing else of it."""
    return hashlib.sha256(_COMMIT + session + seed).digest()


def seal(key: bytes, text: bytes, label: bytes) -> bytes:
    """Return ``text`` readable with ``key`` only, and bound to ``label``."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, label)


def unseal(key: bytes, sealed: bytes, label: bytes) -> bytes:
    """Return what was sealed; raise ``ValueError`` when key, bytes or label are not those."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, label)
    except InvalidTag:
        raise ValueError("what was sealed has been altered, or is another's") from None


def expand(key: bytes, count: int, width: int) -> Field:
    """Return the mask (``count``,) of ``key``, uniform in the field of ``width`` bytes."""
    kind = field(width)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    numbers: Field = np.frombuffer(stream.update(bytes(count * kind.itemsize)), kind)
    return numbers


def _agree(key: X25519PrivateKey, peer: bytes) -> bytes:
    # Raises ValueError for a public key of another length, or of small order.
    return key.exchange(X25519PublicKey.from_public_bytes(peer))


def _derive(secret: bytes, session: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=session, info=b"fedsys " + purpose).derive(secret)
