"""A head that guesses on from a model's stream: one block between the stream and the model's own norm and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from subquad.core.config import config_from_dict, config_to_dict
from subquad.core.errors import CheckpointError, ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Update
from subquad.core.state import State
from subquad.mixers.attention import Attention
from subquad.models.checkpoint import read_config, recover, replace_folder, write_json, write_weights
from subquad.models.config import ModelConfig
from subquad.models.head_config import HeadConfig
from subquad.models.stack import Block, Stack
from subquad.ops import attention, norm, skinny
from subquad.ops.ring import RingState, RingUpdate
from subquad.ops.window import WindowState

MODEL_TYPE = "subquad_draft_head"
SCHEMA = 1
THETA = 10_000.0
# Share of the largest weight of a norm below which a channel counts as dropped.
SMALLEST = 1e-4
# Of so many pairs one is trained to have a block of guesses behind it: 8 then cost what 3 in succession do.
ANCHOR_EVERY = 4


class Head(nn.Module):
    """Guesses from pairs: the model's stream at a token, after its final norm, and the token that was drawn from it.

    ``x = join [norm(stream), norm(embedding)]``, one block of attention and SwiGLU over the pairs, and the model's own
    final norm: what comes out stands for the model's stream at the pair's token. The model's own head makes it a
    distribution of the next token, and with the token that is drawn it is a pair again (arXiv 2401.15077, section 3.1,
    where the two are joined without norms). Embedding, final norm and head are the model's own, and not held here.

    With `config.aux_layers` the model's stream is fused with those behind earlier layers, which know of tokens to come
    what the last one has left to tell the next: ``fuse norm([stream, aux])`` stands for it (arXiv 2503.01840, section
    3.1, where nothing is normed). What the head itself makes stands where such a vector would.

    The attention is a window without sinks, and positions are relative: wherever in a text the head begins, it is the
    same, and its state is constant.

    Args:
        config: the shape.
        ids: the tokens that may be guessed, `config.kept` of them.
    """

    ids_m: Tensor

    def __init__(self, config: HeadConfig, ids: Sequence[int] = ()) -> None:
        super().__init__()
        d, head_dim = config.d_model, config.d_model // config.n_heads
        layer: dict[str, Any] = {
            "mixer": "attention",
            "n_heads": config.n_heads,
            "n_kv_heads": config.n_heads,
            "head_dim": head_dim,
            "rotary": {"theta": THETA, "dim": head_dim},
            "window": config.window,
        }
        self.config = config
        self.norm_stream, self.norm_token = (nn.RMSNorm(d, eps=config.norm_eps) for _ in range(2))
        self.join = nn.Linear(2 * d, d, bias=False)
        self.block = Block(ModelConfig(config.vocab_size, d, config.d_mlp, (layer,), config.norm_eps), layer)
        if config.aux_layers:
            width = (1 + len(config.aux_layers)) * d
            self.norm_fused, self.fuse = nn.RMSNorm(width, eps=config.norm_eps), nn.Linear(width, d, bias=False)
        self.register_buffer("ids_m", torch.tensor(list(ids) or [0] * config.kept, dtype=torch.int64))

    @torch.no_grad()
    def begin_(self, model: Stack) -> Head:
        """Let the stream stand for itself: training then starts from distributions as the model has them.

        A head of chance gives logits as large as the model's own, and wrong ones: half of a short training goes by
        until they are small. Here only the output of attention and SwiGLU, and the token's part, have to grow from 0.
        """
        scale_d = model.norm.weight.to(self.join.weight)
        # The model's norm has multiplied the stream by its weights, and will again. What it drops is gone.
        self.norm_stream.weight.copy_(torch.where(scale_d.abs() > SMALLEST * scale_d.abs().amax(), 1 / scale_d, 0))
        self.join.weight.zero_().fill_diagonal_(1)
        if self.config.aux_layers:
            # Its norm's factor falls out in the next one, but for what that adds to the mean square.
            self.fuse.weight.zero_().fill_diagonal_(1)
        self.mixer.o_proj.weight.zero_()
        assert self.block.mlp is not None
        self.block.mlp.down_proj.weight.zero_()
        return self

    @property
    def mixer(self) -> Attention:
        """The block's attention."""
        return cast("Attention", self.block.mixer)

    def init_pool(self, rows: int, block: int) -> WindowState | RingState:
        """Rows of no pairs that decode; see `Mixer.init_pool`."""
        return cast("WindowState | RingState", self.mixer.init_pool(rows, 0, block))

    def fused(self, hidden_btd: Tensor) -> Tensor:
        """What the head reads of the model's streams, ``[b, t, d]``.

        Args:
            hidden_btd: ``[b, t, d + aux d]``, of `Stack.read` with `config.aux_layers`.
        """
        if not self.config.aux_layers:
            return hidden_btd
        return skinny.project(hidden_btd.to(self.fuse.weight.dtype), self.fuse, norm=self.norm_fused)[0]

    def read(
        self, model: Stack, stream_btd: Tensor, tokens_bt: Tensor, state: State, layout: Layout
    ) -> tuple[Tensor, Update]:
        """Read pairs against `state`: what stands for the stream at each token, ``[b, t, d]``, and the update.

        Args:
            model: that it guesses for.
            stream_btd: where each token was drawn from: the model's, as `fused` has it, or what stood for it.
            tokens_bt: the tokens.
            state: rows aligned with the block's.
            layout: where the pairs stand.
        """
        pairs_bte = norm.join_rms(stream_btd, tokens_bt, model.embed, self.norm_stream, self.norm_token)
        if pairs_bte is None:
            x_btd = self._joined(stream_btd, model.embed(tokens_bt))
        else:
            x_btd = skinny.project(pairs_bte, self.join)[0]
        x_btd, update = self.block.read(x_btd, state, layout)
        return _normed(model, x_btd), update

    def behind(self, update: Update, ahead: int, layout: Layout) -> State:
        """The state behind a read of one pair a row, to read on and to forget; what was read is as it was.

        Args:
            update: of that read.
            ahead: pairs that were read without a commit, this one included.
            layout: of the next.
        """
        if isinstance(update, RingUpdate):
            state = cast("RingState", update.state)
            if ahead <= state.block:
                return state.ahead(layout.positions_bt[:, 0])
        return update.commit()

    def unroll(self, model: Stack, stream_btd: Tensor, tokens_bt: Tensor, steps: int) -> list[Tensor]:
        """The training form: guesses that stand on guesses, behind every pair at once (arXiv 2503.01840, section 3.2).

        In step s (from 0) the last ``s`` pairs up to each column hold what step by step stood for the stream, and those
        before them the stream itself. That is what `read` gives, after the latter were committed, for the former: the
        tokens are those of the text. The text is cut into pieces as long as the window, each of which begins without a
        state, as a text that is being written does: so the head learns all lengths of its context.

        Args:
            model: that it guesses for; nothing of it is trained.
            stream_btd: of the model, at each column's token, as `fused` has it.
            tokens_bt: that follow, each drawn from its column's stream.
            steps: how many guesses stand one on the other.

        Returns:
            For each step ``[b, t, d]``; in the first `s` columns of a piece there is no such guess.
        """
        b, t = tokens_bt.shape
        x_ptd, token_ptd = self._pieces(model, stream_btd, tokens_bt)
        size = x_ptd.shape[1]
        layout = Layout.dense(*x_ptd.shape[:2], device=tokens_bt.device)
        column_t = torch.arange(size, device=tokens_bt.device)
        back_tn = column_t[:, None] - column_t
        out: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(steps):
            x_ptd = self._joined(x_ptd, token_ptd)
            q_pthk, k_pthk, v_pthk = self.mixer.qkv(self.block.norm1(x_ptd), layout)
            keys.append(k_pthk.transpose(1, 2))
            values.append(v_pthk.transpose(1, 2))
            if step:
                seen = [back_tn >= step, *(back_tn == step - s for s in range(1, step + 1))]
                allowed_1tn = torch.cat(seen, dim=1)[None]
                joint = (torch.cat(keys, dim=2), torch.cat(values, dim=2))
                y_pthk = attention.masked(q_pthk, *joint, allowed_1tn, self.mixer.scale)
            else:
                y_pthk = attention.causal(q_pthk, k_pthk, v_pthk, self.mixer.scale)
            y_ptd = self._fed(model, x_ptd, y_pthk)
            out.append(y_ptd.unflatten(0, (b, -1)).flatten(1, 2)[:, :t])
            x_ptd = F.pad(y_ptd[:, :-1], (0, 0, 1, 0))
        return out

    def columns(self, step: int, t: int) -> slice:
        """Of t columns those where `unroll` guesses in a step; it returns no others."""
        return slice(None)

    def _pieces(self, model: Stack, stream_btd: Tensor, tokens_bt: Tensor) -> tuple[Tensor, Tensor]:
        """Streams and embeddings, both ``[p, t, d]``, of pieces as long as the window; the last may end in padding."""
        t = tokens_bt.shape[1]
        size = min(self.config.window, t)
        pad = -t % size
        stream_ptd = F.pad(stream_btd, (0, 0, 0, pad)).view(-1, size, stream_btd.shape[2])
        return stream_ptd, model.embed(F.pad(tokens_bt, (0, pad)).view(-1, size))

    def _joined(self, stream_btd: Tensor, token_btd: Tensor) -> Tensor:
        # In training more precise than the model's, and so stays what the block adds to.
        own = self.norm_stream.weight.dtype
        both = (stream_btd, self.norm_stream), (token_btd, self.norm_token)
        normed = [norm.add_rms(x_btd.to(own), None, scale)[1] for x_btd, scale in both]
        return skinny.project(torch.cat(normed, dim=-1), self.join)[0].to(own)

    def _fed(self, model: Stack, x_btd: Tensor, y_bthk: Tensor) -> Tensor:
        """What the block makes of its input and of what its attention gave, behind the model's norm."""
        return _normed(model, self.block.feed(x_btd, self.mixer.o_proj(y_bthk.flatten(2))))


class BlockHead(Head):
    """Guesses a block of tokens in one read: learned vectors stand where tokens are that nobody knows yet.

    What a `Head` gives behind the last pair is the stream of the first guess, at no read of its own. Behind it come
    ``guesses - 1`` pairs of this stream and a mask each, a learned vector in place of the token's embedding, and one
    read of them all gives the streams of the other guesses (arXiv 2203.16487, where every place of a
    block has a query of its own too). So each guess knows the prefix and its place, and none what the others are.

    The attention over masks is causal. So a guess is the same however many are asked for, and the head that was
    trained for many serves few; a mask tells a later one nothing that it could not read for itself.
    """

    def __init__(self, config: HeadConfig, ids: Sequence[int] = ()) -> None:
        super().__init__(config, ids)
        if config.guesses < 2:
            raise ConfigError(f"block head: expected at least 2 guesses, got {config.guesses}; one is a Head's")
        self.masks_kd = nn.Parameter(torch.randn(config.guesses - 1, config.d_model))

    def ahead(self, model: Stack, stream_bd: Tensor, k: int, state: WindowState | RingState) -> Tensor:
        """What stands for the streams of the next k guesses, ``[b, k, d]``; `state` stays as it is.

        Args:
            model: that it guesses for.
            stream_bd: what `read` gave at each row's last pair.
            k: from 1 to `config.guesses`.
            state: that holds all pairs.
        """
        if k == 1:
            return stream_bd[:, None]
        b = len(stream_bd)
        pairs = (stream_bd[:, None].expand(-1, k - 1, -1), self.masks_kd[: k - 1].expand(b, -1, -1))
        x_bkd, _ = self.block.read(self._joined(*pairs), state, Layout.dense(b, k - 1, start_b=state.seen_b))
        return torch.cat((stream_bd[:, None], _normed(model, x_bkd)), dim=1)

    def unroll(self, model: Stack, stream_btd: Tensor, tokens_bt: Tensor, steps: int) -> list[Tensor]:
        """The training form: the first guess behind every pair, and the others behind some; see `Head.unroll`.

        As there, the guess of step s in column c stands on the true pairs up to column c - s. All masks behind all
        anchors are read at once.

        Returns:
            For each step ``[b, n, d]``, of its `columns`; those whose anchor is in another piece are no guesses.

        Raises:
            ConfigError: more steps than guesses.
        """
        if not 1 <= steps <= self.config.guesses:
            raise ConfigError(f"block head: expected 1 to {self.config.guesses} steps, got {steps}; ask for fewer")
        (b, t), device = tokens_bt.shape, tokens_bt.device
        x_ptd = self._joined(*self._pieces(model, stream_btd, tokens_bt))
        (p, size), every, masks = x_ptd.shape[:2], self._every(t), steps - 1
        q_pthk, k_pthk, v_pthk = self.mixer.qkv(self.block.norm1(x_ptd), Layout.dense(p, size, device=device))
        y_ptd = self._fed(model, x_ptd, attention.causal(q_pthk, k_pthk, v_pthk, self.mixer.scale))
        out = [y_ptd.unflatten(0, (b, -1)).flatten(1, 2)[:, :t]]
        if not masks:
            return out
        anchor_n = torch.arange(0, size, every, device=device).repeat_interleave(masks)
        place_n = torch.arange(masks, device=device).repeat(size // every)
        x_pnd = self._joined(y_ptd[:, anchor_n], self.masks_kd[place_n].expand(p, -1, -1))
        layout = Layout(torch.full((p,), len(anchor_n), device=device), (anchor_n + place_n + 1).expand(p, -1))
        q_pnhk, *both = self.mixer.qkv(self.block.norm1(x_pnd), layout)
        before_nt = torch.arange(size, device=device) <= anchor_n[:, None]
        among_nn = (anchor_n[:, None] == anchor_n) & (place_n[:, None] >= place_n)
        k_phmk, v_phmk = (torch.cat(x, dim=1).transpose(1, 2) for x in zip((k_pthk, v_pthk), both, strict=True))
        allowed_1nm = torch.cat((before_nt, among_nn), dim=1)[None]
        y_pnhk = attention.masked(q_pnhk, k_phmk, v_phmk, allowed_1nm, self.mixer.scale)
        ahead_pand = self._fed(model, x_pnd, y_pnhk).unflatten(1, (-1, masks))
        for step in range(1, steps):
            guess_bnd = ahead_pand[:, :, step - 1].unflatten(0, (b, -1)).flatten(1, 2)
            out.append(guess_bnd[:, : len(range(t)[self.columns(step, t)])])
        return out

    def columns(self, step: int, t: int) -> slice:
        """All in the first step; then those that lie `step` columns behind an anchor."""
        return slice(step, None, self._every(t)) if step else slice(None)

    def _every(self, t: int) -> int:
        """The distance of two anchors in t columns, such that each piece begins with one."""
        return math.gcd(min(self.config.window, t), ANCHOR_EVERY)


def _normed(model: Stack, x_btd: Tensor) -> Tensor:
    """The model's final norm."""
    if x_btd.dtype == model.norm.weight.dtype:
        return norm.add_rms(x_btd, None, model.norm)[1]
    return F.rms_norm(x_btd, (x_btd.shape[-1],), model.norm.weight.to(x_btd.dtype), model.norm.eps)


def untrained(config: HeadConfig, ids: Sequence[int] = (), *, seed: int = 0) -> Head:
    """A head of chance, in float32 on the CPU; the same for the same seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return (BlockHead if config.guesses > 1 else Head)(config, ids)


def save_head(head: Head, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into `folder`; other files there are kept.

    Raises:
        CheckpointError: it could not be written, or the folder holds something else.
    """

    def write(fresh: Path) -> None:
        write_weights(head.state_dict(), fresh)
        write_json(fresh / "config.json", {"model_type": MODEL_TYPE, "schema": SCHEMA, **config_to_dict(head.config)})

    replace_folder(folder, MODEL_TYPE, write)


def load_head(folder: str | Path) -> Head:
    """Read a head that `save_head` wrote, onto the CPU.

    Raises:
        CheckpointError: none there, a damaged one, or of an unknown schema.
        ConfigError: an unknown or missing key in config.json.
    """
    path = Path(folder).expanduser().resolve()
    recover(path)
    values = read_config(path)
    if values.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{path}: expected a draft head, got another model; give what subquad draft --head wrote")
    if (schema := values.pop("schema", None)) != SCHEMA:
        raise CheckpointError(f"{path}: expected schema {SCHEMA}, got {schema!r}; use the version that wrote it")
    config = config_from_dict(HeadConfig, values, where=f"{path}/config.json")
    head = untrained(config)
    try:
        head.load_state_dict(load_file(str(path / "model.safetensors")))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: could not be read ({error}); fetch or train the head again") from error
    return head.requires_grad_(False).eval()
