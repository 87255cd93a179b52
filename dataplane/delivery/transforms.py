"""What changes content between acceptance and signing: a tuple of functions, applied in order before each attempt.

The bytes that leave this stage are the bytes that are signed and sent (P10). An account that switched nothing on gets
the empty tuple, and the content is not even copied. A transform takes the envelope and content with CRLF line ends,
returns content with CRLF line ends, and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable

from dataplane.core.envelope import Envelope

Transform = Callable[[Envelope, bytes], bytes]

NO_TRANSFORMS: tuple[Transform, ...] = ()


def apply_transforms(transforms: tuple[Transform, ...], envelope: Envelope, content: bytes) -> bytes:
    """Return the content as it is to be signed and sent."""
    for transform in transforms:
        content = transform(envelope, content)
    return content
