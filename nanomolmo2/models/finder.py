"""Finding by example, all at once: which patches hold the middle of a thing that is asked for.

    Point to everything like <point>.         the question; its points select patches
                                   ^ state    what has been asked, as the decoder understood it

A patch claims to hold the middle of some thing, and looks like what is wanted or not; both must be
so. What is wanted is the mean of the examples' looks, each weighed by how far it is meant ("not
like <point>" turns it round), and what the question's state adds. A look is seen twice: by the ViT
patch, and by the visual token around it. What the decoder made of that token adds the rest.

    wanted    sum of gate(state at example j) * look(patch j) + add(state), of length 1
    alike     scale * (look . wanted + bias) of patch and token, + context key . context query
    first     both: -log(exp(-claim) + exp(-alike) + exp(-claim - alike))

How near is near enough depends on what else there is: walnuts beside hazelnuts, or beside coins. So
a small transformer sees the likeliest candidates of a question together, and corrects their scores.
Its attention knows of every two candidates how alike they are and where they lie to each other:
those of one kind stand or fall together, and of two that speak of one thing one is enough.

n patches, m visual tokens, Q questions, J examples of all of them, K candidates; F, D the widths of
ViT features and of tokens and states; E of looks, W of the transformer, H its heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.1  # of likeness, at first
MIN_SCALE, MAX_SCALE = 1.0, 50.0  # of likeness, which is learned
TOKEN_SHARE = 0.3  # of a token's claim in that of its patches, at first
CANDIDATES = 128  # of a question that are seen together: 60 things, and what else may be one
WIDTH, HEADS, LAYERS = 96, 4, 2
PAIRS = 6  # numbers about two candidates
APART = 1000.0  # patches between two pictures
FAR = -1e4  # score of what is in no picture of the question


def plain_norm(x: Tensor) -> Tensor:
    """To a root mean square of 1."""
    return F.rms_norm(x, x.shape[-1:])


class Reader(nn.Module):
    """What is read off patches, or off visual tokens: claims, looks, ways.

    way: right and down to the middle of the thing that is shown, and the logarithm of its longer
        side, all in patches (or tokens).
    """

    def __init__(self, width: int, size: int, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        self.middle = nn.Linear(width, 1)
        self.embed = nn.Linear(width, size)
        self.way = nn.Linear(width, 3)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(-0.5))  # a likeness below is unlike

    def look(self, cells: Tensor) -> Tensor:
        """(..., width) -> (..., E) of length 1."""
        return F.normalize(self.embed(plain_norm(cells)), dim=-1)

    def claim(self, cells: Tensor) -> Tensor:
        """(..., width) -> (...) logits: is the middle of a thing in it?"""
        return self.middle(plain_norm(cells))[..., 0]

    def scale(self) -> Tensor:
        """Of likeness as logits."""
        return self.log_scale.exp().clamp(MIN_SCALE, MAX_SCALE)

    def alike(self, likeness: Tensor) -> Tensor:
        """Cosines -> logits: is it of one kind?"""
        return self.scale() * (likeness + self.bias)


class Patches(NamedTuple):
    """What is known of n patches."""

    look: Tensor  # (n, E)
    token_look: Tensor  # (n, E)
    context: Tensor  # (n, E)
    claim: Tensor  # (n,)
    way: Tensor  # (n, 3)
    grid: Tensor  # (n, 2) column and row of the patch; pictures lie `APART`


class Wanted(NamedTuple):
    """What Q questions ask for."""

    look: Tensor  # (Q, E)
    token_look: Tensor  # (Q, E)
    context: Tensor  # (Q, E)
    size: Tensor  # (Q,) mean of the examples' logarithms of their size; 0 without one
    given: Tensor  # (Q, n) how far an example is meant, where there is one
    states: Tensor  # (Q, D)


class Scores(NamedTuple):
    """Logits (Q, n): is the middle of a thing that a question asks for in a patch?"""

    first: Tensor  # of each patch by itself
    final: Tensor  # among the others


class JudgeLayer(nn.Module):
    """A layer of the transformer, whose attention also goes by what is known of two candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Args: x: (Q, K, W). bias: (Q, H, K, K) added to the logits of attention."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Judge(nn.Module):
    """Sees the candidates of a question together."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.read = nn.Linear(4 * size + 8, WIDTH)
        self.read_state = nn.Linear(hidden_size, WIDTH)
        self.read_pairs = nn.Sequential(
            nn.Linear(PAIRS, 16), nn.GELU(), nn.Linear(16, LAYERS * HEADS)
        )
        self.layers = nn.ModuleList(JudgeLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.decide = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.decide.weight)
        nn.init.zeros_(self.decide.bias)

    def forward(self, candidates: Tensor, pairs: Tensor, states: Tensor, shown: Tensor) -> Tensor:
        """(Q, K) to add to the scores.

        Args:
            candidates: (Q, K, 4 E + 8). pairs: (Q, K, K, `PAIRS`). states: (Q, D). shown: (Q, K)
                bool, False = no candidate.
        """
        state = self.read_state(plain_norm(states))[:, None]
        x = torch.cat((state, self.read(candidates)), dim=1)
        # Nothing is known of the state and another.
        biases = F.pad(self.read_pairs(pairs).permute(0, 3, 1, 2), (1, 0, 1, 0))
        biases = biases.masked_fill(F.pad(~shown, (1, 0))[:, None, None], FAR)
        for layer, bias in zip(self.layers, biases.chunk(LAYERS, dim=1), strict=True):
            x = layer(x, bias)
        return self.decide(self.norm(x[:, 1:]))[..., 0]


def pairs_of(patches: Patches, best: Tensor) -> Tensor:
    """(Q, K, K, `PAIRS`) of every two candidates: how alike their looks are, of patch and of token;
    whether they speak of one place; how far it is from one to the other; and their sizes.

    Args: best: (Q, K) the candidates, of n.
    """
    alike = [look[best] @ look[best].mT for look in (patches.look, patches.token_look)]
    way = patches.way.detach()[best]
    middle, size = patches.grid[best] + 0.5 + way[..., :2], way[..., 2]
    away = (middle[:, :, None] - middle[:, None]).norm(dim=-1).clamp(max=APART)
    larger = torch.maximum(size[:, :, None], size[:, None]).clamp(-2, 4)
    one_place = torch.exp(-((2 * away / larger.exp()) ** 2))
    other = (size[:, :, None] - size[:, None]).clamp(-4, 4)
    found = (*alike, one_place, torch.exp(-away / 2), torch.log1p(away) / 2, other)
    return torch.stack([x.to(way.dtype) for x in found], dim=-1)


class Finder(nn.Module):
    """Scores of patches; see above."""

    def __init__(self, feature_dim: int, hidden_size: int, size: int) -> None:
        super().__init__()
        self.patch = Reader(feature_dim, size)
        self.token = Reader(hidden_size, size)
        self.token_claim = nn.Parameter(torch.tensor(TOKEN_SHARE))
        self.shares = nn.Parameter(torch.tensor([0.5, 0.5]))  # of patch and token in likeness
        self.gate = nn.Linear(hidden_size, 1)
        self.add = nn.Linear(hidden_size, 2 * size, bias=False)
        self.context_q = nn.Linear(hidden_size, size)
        self.context_k = nn.Linear(hidden_size, size, bias=False)
        self.judge = Judge(hidden_size, size)
        for module in (self.gate, self.context_q):
            nn.init.zeros_(module.weight)
        # Little beside an example's look, but not nothing: a name alone has no other.
        nn.init.normal_(self.add.weight, std=0.002)
        nn.init.ones_(self.gate.bias)
        nn.init.zeros_(self.context_q.bias)

    def patches(
        self, features: Tensor, tokens: Tensor, states: Tensor, rows: Tensor, grid: Tensor
    ) -> Patches:
        """What is seen.

        Args:
            features: (n, F) of the patches. tokens: (m, D) as the connector gave them. states:
                (m, D) what the decoder made of them. rows: (n,) the token of each patch. grid:
                (n, 2) its column and row; pictures lie `APART`.
        """
        looks = self.token.look(tokens)[rows]
        context = self.context_k(plain_norm(states))[rows]
        claims = self.patch.claim(features) + self.token_claim * self.token.claim(tokens)[rows]
        way = self.patch.way(plain_norm(features))
        return Patches(self.patch.look(features), looks, context, claims, way, grid)

    def wanted(
        self,
        patches: Patches,
        states: Tensor,
        example_states: Tensor | None,
        examples: Tensor,
        question: Tensor,
        gates: Tensor | None = None,
    ) -> Wanted:
        """What is asked for.

        Args:
            states: (Q, D) at the end of the questions. example_states: (J, D) at their points.
            examples: (J,) the patches that these select. question: (J,) the question of each.
            gates: (J,) -1 to 1, how far each is meant; by default the states at the points say it.
        """
        if gates is None:
            assert example_states is not None
            gates = torch.tanh(self.gate(plain_norm(example_states)))[:, 0]
        ends = plain_norm(states)
        added = self.add(ends).chunk(2, dim=-1)
        of_examples = (look[examples] for look in (patches.look, patches.token_look))
        looks = [
            F.normalize(add.index_add(0, question, (gates[:, None] * look).to(add.dtype)), dim=-1)
            for add, look in zip(added, of_examples, strict=True)
        ]
        none = gates.new_zeros(len(states))
        number = none.index_add(0, question, torch.ones_like(gates)).clamp(min=1)
        size = none.index_add(0, question, patches.way[examples, 2].to(none.dtype)) / number
        given = gates.new_zeros(len(states), len(patches.claim))
        given = given.index_put((question, examples), gates)
        return Wanted(looks[0], looks[1], self.context_q(ends), size, given, states)

    def forward(
        self, wanted: Wanted, patches: Patches, mine: Tensor, candidates: int = CANDIDATES
    ) -> Scores:
        """Args:
        mine: (Q, n) bool, whether a patch is in a picture of the question.
        candidates: of a question that are seen together.
        """
        likeness = wanted.look @ patches.look.T, wanted.token_look @ patches.token_look.T
        of_patch = self.patch.alike(likeness[0])
        of_token = self.token.alike(likeness[1])
        context = wanted.context @ patches.context.T / math.sqrt(patches.context.shape[1])
        alike = self.shares[0] * of_patch + self.shares[1] * of_token + context
        first = both(patches.claim, alike).masked_fill(~mine, FAR)
        # Examples are always seen, also those that are not meant.
        rank = first.detach() - FAR * (wanted.given != 0)
        best = rank.topk(min(candidates, rank.shape[1]), dim=1).indices  # (Q, K)
        seen = [x.gather(1, best) for x in (first, of_patch, of_token, context, wanted.given)]
        way, looks = patches.way[best], (patches.look[best], patches.token_look[best])
        scalars = torch.stack(
            (*seen, patches.claim[best], way[..., 2], way[..., 2] - wanted.size[:, None]), dim=-1
        )
        products = wanted.look[:, None] * looks[0], wanted.token_look[:, None] * looks[1]
        shown = mine.gather(1, best)
        scalars = scalars.clamp(-20, 20)
        known = torch.cat((*looks, *products, scalars), dim=-1)
        change = self.judge(known, pairs_of(patches, best), wanted.states, shown)
        return Scores(first, first.scatter_add(1, best, change.to(first.dtype) * shown))


def both(a: Tensor, b: Tensor) -> Tensor:
    """The logit of two things being so, from the logit of each, broadcast."""
    a, b = torch.broadcast_tensors(a, b)
    return -torch.stack((-a, -b, -a - b)).logsumexp(dim=0)
