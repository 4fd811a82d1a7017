"""The five systems in PyTorch, a plain statement of each with torch alone: what bench_torch.py times beside masque.

    mae        MAE (arXiv 2111.06377)
    dmae       DMAE (2208.12256): a larger MAE on the same patches, run up to the block that is aligned
    maskedkd   MaskedKD (2302.10494): a classifier whose teacher sees the patches that the student's class token attends to most
    dmjd       DMJD (2301.00230) on MAE with pixel targets: two disjoint views, a head for the patches that are seen
    tinymim    TinyMIM (2301.01296): relations between tokens, the teacher up to a block's queries, keys and values

Each is a module whose `forward(images, draw)` is the loss of a batch; `draw` hands out random numbers by name, so that a check can give
recorded ones. Names of parameters are those of the official checkpoints. A teacher is a submodule without gradients; it runs under no_grad,
and its time is taken where `clock` is a list. Nothing in a loss asks the device for a number.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

# name: width, depth, heads
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
METHODS = ("mae", "dmae", "maskedkd", "dmjd", "tinymim")
# Model and teacher where none are asked for.
USUAL = {"mae": ("tiny", None), "dmae": ("tiny", "small"), "maskedkd": ("tiny", "small"), "dmjd": ("tiny", None), "tinymim": ("tiny", "base")}


# ---- attention ----


def split_heads(qkv, heads):
    """Packed [B, N, 3*H*D] to q, k, v of [B, H, N, D]."""
    b, n, c3 = qkv.shape
    return qkv.reshape(b, n, 3, heads, c3 // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(y):
    """[B, H, N, D] to [B, N, H*D]."""
    b, h, n, d = y.shape
    return y.transpose(1, 2).reshape(b, n, h * d)


def attention_eager(qkv, heads):
    q, k, v = split_heads(qkv, heads)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, H, N, N]
    return join_heads(scores.softmax(dim=-1) @ v)


def attention_sdpa(qkv, heads):
    q, k, v = split_heads(qkv, heads)
    return join_heads(F.scaled_dot_product_attention(q, k, v))


ATTENTION = {"eager": attention_eager, "sdpa": attention_sdpa}


# ---- a vision transformer ----


def sincos(dim, grid, extra=1):
    """Position table [1, extra + grid*grid, dim]: zeros for tokens in front; column half, then row half; float32."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    at = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # [grid, dim/4]
    wave = torch.cat([at.sin(), at.cos()], dim=1)  # [grid, dim/2]
    column = wave[None, :, :].expand(grid, grid, -1)
    row = wave[:, None, :].expand(grid, grid, -1)
    table = torch.cat([column, row], dim=2).reshape(grid * grid, dim)
    return torch.cat([torch.zeros(extra, dim, dtype=torch.float64), table])[None].float()


class Attention(nn.Module):
    def __init__(self, dim, heads, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attention(self.qkv(x), self.heads))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, attention, mlp_ratio=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def qkv(self, x):
        return self.attn.qkv(self.norm1(x))

    def forward_seen(self, x):
        """The same, and what the class token attends to, a mean over heads: [B, N - 1], float32, no gradient."""
        qkv = self.qkv(x)
        x = x + self.attn.proj(self.attn.attention(qkv, self.attn.heads))
        with torch.no_grad():
            q, k, _ = split_heads(qkv, self.attn.heads)
            row = (q[:, :, :1] @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5  # [B, H, 1, N]
            saliency = row.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
        return x + self.mlp(self.norm2(x)), saliency


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, L, D]


def take(x, ids):
    """Rows `ids` [B, K] of x [B, L, D]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class Vit(nn.Module):
    """Class token in front, fixed positions unless `learned`, a head where there are classes."""

    def __init__(self, image, patch, size, attention, learned=False, classes=None, last_heads=None, mlp_ratio=4):
        super().__init__()
        dim, depth, heads = size
        self.grid, self.patch, self.dim = image // patch, patch, dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos(dim, self.grid), requires_grad=learned)
        self.patch_embed = PatchEmbed(patch, dim)
        of = [heads] * (depth - 1) + [last_heads or heads]
        self.blocks = nn.ModuleList([Block(dim, h, attention, mlp_ratio) for h in of])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if classes:
            self.head = nn.Linear(dim, classes)

    def initialise(self):
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        return self

    def embed(self, images, ids=None):
        """[B, 1 + K, D]: patches and positions, then the choice, then the class token. Of M views `ids` has M*B rows."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        if ids is not None:
            views = ids.shape[0] // x.shape[0]
            x = take(x if views == 1 else x.repeat(views, 1, 1), ids)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], dim=1)

    def run(self, x, until=None):
        for block in self.blocks[:until]:
            x = block(x)
        return x

    def logits(self, x):
        return self.head(self.norm(x[:, 0]))

    def frozen(self):
        return self.initialise().requires_grad_(False)


class Taught:
    """A module with a teacher; `clock` gathers the seconds of its passes where it is a list."""

    clock = None

    def ask(self, images, work):
        """What `work` makes of the images, without a gradient; in bf16 throughout where the teacher's weights are."""
        begin = None if self.clock is None else time.perf_counter()
        dtype = self.teacher.patch_embed.proj.weight.dtype
        cast = torch.is_autocast_enabled(images.device.type) and dtype != torch.bfloat16
        with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=cast):
            answer = work(images.to(dtype))
        if begin is not None:
            self.clock.append(time.perf_counter() - begin)
        return answer


# ---- MAE and what is built on it ----


def random_mask(noise, keep):
    """What is kept, in the order of its noise [B, K], where each patch is in that order, and 1 where one is hidden [B, L]."""
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return shuffle[:, :keep], restore, (restore >= keep).to(noise.dtype)


def hidden_mean(per_patch, mask):
    return (per_patch * mask).sum() / mask.sum()


class Mae(Vit):
    """The state dict has MAE's names in MAE's order."""

    def __init__(self, image, patch, encoder, decoder, attention, norm_pix=True, mask_ratio=0.75, out=None, class_token=True, mlp_ratio=4):
        super().__init__(image, patch, encoder, attention, mlp_ratio=mlp_ratio)
        dim, depth, heads = decoder
        self.norm_pix, self.extra = norm_pix, int(class_token)
        self.keep = int(self.grid**2 * (1 - mask_ratio))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos(dim, self.grid, self.extra), requires_grad=False)
        self.decoder_embed = nn.Linear(self.dim, dim)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads, attention, mlp_ratio) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, out or 3 * patch * patch)

    def initialise(self):
        nn.init.normal_(self.mask_token, std=0.02)
        return super().initialise()

    def target(self, images):
        """The pixels of each patch, [B, L, P]."""
        b, p, grid = images.shape[0], self.patch, self.grid
        x = images.reshape(b, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1)  # [B, row, col, py, px, C]
        x = x.reshape(b, grid * grid, p * p * 3)
        if self.norm_pix:
            mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True)
            x = (x - mean) / (var + 1e-6).sqrt()
        return x

    def decode(self, x, restore):
        """From tokens behind the encoder to predictions of all patches, [B, L, P]."""
        x = self.decoder_embed(x)
        front, kept = x[:, : self.extra], x[:, self.extra :]
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], restore.shape[1] - kept.shape[1], -1)
        y = take(torch.cat([kept, hidden], dim=1), restore)
        x = torch.cat([front, y], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, self.extra :]

    def reconstruction(self, pred, images, mask):
        return hidden_mean(((pred.to(images.dtype) - self.target(images)) ** 2).mean(dim=-1), mask)

    def forward(self, images, draw):
        ids, restore, mask = random_mask(draw("noise", images.shape[0], self.grid**2), self.keep)
        x = self.norm(self.run(self.embed(images, ids)))
        return self.reconstruction(self.decode(x, restore), images, mask)


class Dmae(Taught, Mae):
    """Blocks count from 0: what the student's block gives is pulled toward what the teacher's gives."""

    def __init__(self, *args, teacher, block, teacher_block, **kwargs):
        super().__init__(*args, **kwargs)
        self.aligned_feature_projection_heads = nn.ModuleList([nn.Linear(self.dim, teacher.dim)])
        self.teacher, self.at, self.teacher_at = teacher, block, teacher_block

    def forward(self, images, draw):
        ids, restore, mask = random_mask(draw("noise", images.shape[0], self.grid**2), self.keep)
        teacher = self.teacher
        theirs = self.ask(images, lambda x: F.normalize(teacher.run(teacher.embed(x, ids), self.teacher_at + 1).to(images.dtype), dim=-1))
        x = self.run(self.embed(images, ids), self.at + 1)
        own = self.aligned_feature_projection_heads[0](x).to(images.dtype)
        for block in self.blocks[self.at + 1 :]:
            x = block(x)
        pixels = self.reconstruction(self.decode(self.norm(x), restore), images, mask)
        return pixels + F.l1_loss(F.normalize(own, dim=-1), theirs)


def disjoint_masks(noise, keep, p, q):
    """Two views of each image, the second of which hides what the first showed: kept [2B, K], restore and mask [2B, L].

    `p` permutes what the first view shows, `q` what it hides; the same for all images. At least half is hidden, so that two views share nothing."""
    first = noise.argsort(dim=1)
    shown, hidden = first[:, :keep], first[:, keep:]
    masked = noise.shape[1] - keep
    kept, rest = hidden[:, q[masked - keep :]], hidden[:, q[: masked - keep]]
    second = torch.cat([kept, shown[:, p], rest], dim=1)
    order = torch.cat([first, second])
    restore = order.argsort(dim=1)
    return order[:, :keep], restore, (restore >= keep).to(noise.dtype)


class Dmjd(Mae):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dim, out = self.decoder_norm.weight.shape[0], self.decoder_pred.out_features
        norm = lambda affine: nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)
        layers = [nn.Linear(self.dim, dim), norm(True), nn.GELU(), nn.Linear(dim, dim), norm(True), nn.GELU(), nn.Linear(dim, dim), norm(False)]
        self.proj_embed = nn.Sequential(*layers)
        self.predictor = nn.Sequential(nn.Linear(dim, out))

    def loss_of(self, latent, target, ids, restore, mask):
        """From tokens behind the encoder, [2B, extra + K, D], and the targets of all patches, [B, L, P]."""
        pred = self.decode(latent, restore).to(target.dtype)
        pred = pred.view(2, *target.shape)  # [views, B, L, P]
        hidden = hidden_mean(((pred - target) ** 2).mean(dim=-1).flatten(0, 1), mask)
        shown = self.predictor(self.proj_embed(latent[:, self.extra :])).to(target.dtype)
        wanted = take(target.repeat(2, 1, 1), ids)
        return hidden, F.smooth_l1_loss(shown, wanted, beta=2.0)

    def forward(self, images, draw):
        b, patches = images.shape[0], self.grid**2
        p, q = draw.order("shown", self.keep), draw.order("hidden", patches - self.keep)
        ids, restore, mask = disjoint_masks(draw("noise", b, patches), self.keep, p, q)
        latent = self.norm(self.run(self.embed(images, ids)))
        hidden, shown = self.loss_of(latent, self.target(images), ids, restore, mask)
        return hidden + shown


# ---- distillation without a decoder ----


class MaskedKd(Taught, Vit):
    """Labels and a teacher's answers, half and half, at temperature 1."""

    def __init__(self, *args, teacher, keep, **kwargs):
        super().__init__(*args, learned=True, **kwargs)
        self.teacher, self.keep = teacher, keep

    def forward(self, images, draw):
        x = self.run(self.embed(images), len(self.blocks) - 1)
        x, saliency = self.blocks[-1].forward_seen(x)
        logits = self.logits(x).to(images.dtype).log_softmax(dim=-1)
        ids, teacher = saliency.topk(self.keep, dim=1).indices, self.teacher
        answers = self.ask(images, lambda x: teacher.logits(teacher.run(teacher.embed(x, ids))).to(images.dtype).log_softmax(dim=-1))
        labels = -(draw.targets() * logits).sum(dim=-1).mean()
        return 0.5 * labels + 0.5 * F.kl_div(logits, answers, reduction="batchmean", log_target=True)


def relations(qkv, heads, dtype):
    """Scaled products of queries with keys and of values with values, [B, H, N, N] each."""
    q, k, v = split_heads(qkv, heads)
    scale = q.shape[-1] ** -0.5
    return [((x * scale) @ y.transpose(-2, -1)).to(dtype) for x, y in ((q, k), (v, v))]


class Tinymim(Taught, Vit):
    """The last block of the student relates its tokens as the teacher's block (from 1) does."""

    def __init__(self, *args, teacher, teacher_block, mask_ratio=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.until = teacher, teacher_block - 1
        self.keep = int(self.grid**2 * (1 - mask_ratio))

    def forward(self, images, draw):
        ids = None
        if self.keep < self.grid**2:
            ids = random_mask(draw("noise", images.shape[0], self.grid**2), self.keep)[0]
        heads, teacher, last = self.blocks[-1].attn.heads, self.teacher, self.blocks[-1]

        def teach(x):
            qkv = teacher.blocks[self.until].qkv(teacher.run(teacher.embed(x, ids), self.until))
            logs = [r.log_softmax(dim=-1).flatten() for r in relations(qkv, heads, images.dtype)]
            theirs = [log.exp() for log in logs]
            return theirs, sum(torch.dot(r, log) for r, log in zip(theirs, logs))

        theirs, constant = self.ask(draw.for_teacher(images), teach)
        own = relations(last.qkv(self.run(self.embed(images, ids), len(self.blocks) - 1)), heads, images.dtype)
        rows = own[0].shape[0] * own[0].shape[1] * own[0].shape[2]
        return (constant - sum(torch.dot(t, r.log_softmax(dim=-1).flatten()) for t, r in zip(theirs, own))) / rows


# ---- what is asked for ----


class Draw:
    """Random numbers on a device, and what else a batch holds."""

    def __init__(self, device, targets=None):
        self.device, self.labels = device, targets

    def __call__(self, name, rows, columns):
        return torch.rand(rows, columns, device=self.device)

    def order(self, name, count):
        return torch.randperm(count, device=self.device)

    def targets(self):
        return self.labels

    def for_teacher(self, images):
        return images


def make(method, options, attention):
    """A model with random weights. `options`: model, teacher, image_size, patch_size, mask_ratio, keep, teacher_block, decoder, norm_pix, classes."""
    o, size = options, SIZES[options.model]
    own = (o.image_size, o.patch_size, size, attention)
    if method == "mae":
        return Mae(*own[:3], o.decoder, attention, o.norm_pix, o.mask_ratio).initialise()
    if method == "dmjd":
        return Dmjd(*own[:3], o.decoder, attention, o.norm_pix, o.mask_ratio).initialise()
    theirs = SIZES[o.teacher]
    teacher = Vit(o.image_size, o.patch_size, theirs, attention, classes=o.classes if method == "maskedkd" else None).frozen()
    if method == "dmae":
        block = 3 * size[1] // 4 - 1
        model = Dmae(*own[:3], o.decoder, attention, o.norm_pix, o.mask_ratio, teacher=teacher, block=block, teacher_block=o.teacher_block - 1)
        return model.initialise()
    if method == "maskedkd":
        return MaskedKd(*own, teacher=teacher, keep=o.keep, classes=o.classes).initialise()
    return Tinymim(*own, teacher=teacher, teacher_block=o.teacher_block, mask_ratio=o.mask_ratio, last_heads=theirs[2]).initialise()
