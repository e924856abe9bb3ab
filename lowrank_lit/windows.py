"""Which tokens a perplexity reads together and which of them it scores: blocks or a sliding window, with BOS or not.

=============  =====================================================================================================
protocol       of ``length`` tokens per window
=============  =====================================================================================================
``blocks``     windows side by side; tokens 2 to ``length`` of each are scored, the first of each is context alone
``sliding``    a window every ``stride`` tokens; each scores the tokens that no window before it held, so that every
               token but the text's first is scored once, after at least ``length - stride`` tokens, or all there are
=============  =====================================================================================================

With ``bos="prepend"`` the first place of every window is the tokenizer's BOS, ``length - 1`` tokens of text follow, and
the text's first token (under ``blocks`` the first of every window) is scored too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_lit.errors import DataError

PROTOCOLS = ("blocks", "sliding")
BOS_POLICIES = ("none", "prepend")


@dataclass(frozen=True)
class Protocol:
    """How a text is cut for a perplexity.

    Attributes:
        name: ``blocks`` or ``sliding``.
        length: Tokens per window, BOS included.
        stride: Tokens from one sliding window to the next; ``None`` is half of a window.
        bos: ``none`` or ``prepend``.

    Raises:
        DataError: For an unknown name or a number out of range.
    """

    name: str = "blocks"
    length: int = 256
    stride: int | None = None
    bos: str = "none"

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise DataError(f"protocol='{self.name}' is unknown; choose one of {', '.join(PROTOCOLS)}")
        if self.bos not in BOS_POLICIES:
            raise DataError(f"bos='{self.bos}' is unknown; choose one of {', '.join(BOS_POLICIES)}")
        if self.length < 2:
            raise DataError(f"length={self.length} is too small; a window needs at least 2 tokens")
        if self.stride is not None and self.name != "sliding":
            raise DataError(f"stride={self.stride} belongs to protocol='sliding'; leave it out with '{self.name}'")
        if self.stride is not None and not 1 <= self.stride < self.length:
            raise DataError(f"stride={self.stride} is outside [1, {self.length - 1}], one less than a window's length")

    @property
    def step(self) -> int:
        """Tokens of text from one window to the next."""
        if self.name == "blocks":
            return self.length - (self.bos == "prepend")
        return max(1, self.length // 2) if self.stride is None else self.stride

    def describe(self) -> str:
        """The protocol in words that may follow the number of windows."""
        first = "BOS before each" if self.bos == "prepend" else "no BOS"
        if self.name == "blocks":
            return f"blocks of {self.length} tokens, {first}"
        least = self.length - self.step
        return (
            f"windows of {self.length} tokens, one every {self.step}, {first}, each token scored once after at least "
            f"{least} tokens or all there are"
        )


@dataclass(frozen=True)
class Windows:
    """Token ids to read, and where scoring begins.

    Attributes:
        ids: LongTensor ``(n, length)``.
        first: LongTensor ``(n,)``: place in each window of the first token that is scored, at least 1.
    """

    ids: Tensor
    first: Tensor

    @property
    def targets(self) -> int:
        """Number of tokens that are scored."""
        return int((self.ids.shape[1] - self.first).sum())


def cut_windows(tokens: Tensor, protocol: Protocol, bos_id: int | None = None) -> Windows:
    """Cut one text by a protocol.

    Args:
        tokens: Ids of the text, LongTensor ``(n,)``.
        protocol: Blocks leave out what fills no window; of sliding windows the last begins early enough to be full.
        bos_id: Id that ``bos="prepend"`` puts first.

    Raises:
        DataError: If the text is shorter than a window, or there is no id to prepend.
    """
    begin = protocol.bos == "prepend"
    size = protocol.length - begin
    if len(tokens) < size:
        raise DataError(f"the text has {len(tokens)} tokens, less than one window of {size}; give a longer text")
    starts = torch.arange(0, len(tokens) - size + 1, protocol.step)
    first = torch.full_like(starts, 1 - begin)
    if protocol.name == "sliding":
        rest = len(tokens) - size - int(starts[-1])
        if rest:
            starts = torch.cat([starts, starts[-1:] + rest])
        # What the window before did not hold; of the first window all that has something before it.
        first = torch.cat([torch.tensor([1 - begin]), size - starts.diff()])
    ids = tokens[starts[:, None] + torch.arange(size)]
    if begin:
        if bos_id is None:
            raise DataError("bos='prepend': the tokenizer has no BOS token; choose bos='none'")
        ids = torch.cat([torch.full((len(ids), 1), bos_id), ids], dim=1)
        first = first + 1
    return Windows(ids, first)
