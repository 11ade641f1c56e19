"""Keys of pages by content: equal keys, equal keys and values. Knows token ids; refuses to know pages.

What K and V of a page depend on: the tokens of the page, all tokens before it, and their positions; and
the model, its dtype and its rungs. The key chains the first three (a page's key is a hash of the key before
it and of its own tokens, from position 0 on). The others are fixed for the life of an engine, and the cache
is inside one; who swaps a kernel or a weight in a living one calls BlockAllocator.forget_content. Whatever
comes to change K and V from request to request (an adapter) has to enter the first page's key. That a page
computed in any chunk, packed with anything, has the same bits is the engine's contract of batch invariance.

Two contents with one key would hand a request another's keys and values, so the hash is a cryptographic one,
BLAKE2b of 32 bytes (RFC 7693): no collision is known or can be searched for, and tokens need not be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

KEY_BYTES = 32


def extend_keys(keys: list[bytes], token_ids: Sequence[int], start: int, block_size: int) -> None:
    """Append to `keys`, those of a sequence's first pages, the keys of its next whole pages.

    token_ids: of positions `start` on, which is where the first page without a key begins; a rest that fills
    no page is left out. Raises ValueError for another `start`.
    """
    if start != len(keys) * block_size:
        raise ValueError(f"{len(keys)} pages of {block_size} tokens have keys, not {start} tokens")
    whole = len(token_ids) // block_size * block_size
    content = np.array(token_ids[:whole], np.int32).tobytes()
    page_bytes = 4 * block_size
    key = keys[-1] if keys else b""
    for at in range(0, len(content), page_bytes):
        key = blake2b(key + content[at : at + page_bytes], digest_size=KEY_BYTES).digest()
        keys.append(key)
