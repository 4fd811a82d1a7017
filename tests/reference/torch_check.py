"""Are the models of torch_models.py the papers'? Losses and gradients in float64 against the golden micro-model of MAE and recorded cases.

The cases are those of tests/fixtures/parity, which masque is compared with too: numbers of the authors' own programs, computed in float64 and
stored as float32. DMJD's are of a ConViT: from what its encoder gave on, everything is compared; the encoder here is MAE's.
"""

import itertools
import json
import math
import struct

import torch
from torch_models import ATTENTION, Dmae, Dmjd, Mae, MaskedKd, Tinymim, Vit, disjoint_masks

TYPES = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
# Of the largest number of a tensor: what storing it as float32 changes, and where rounded numbers are computed on with.
ROUNDED = 2e-7
FROM_ROUNDED = 1e-6


class Wrong(Exception):
    """What does not agree, or cannot be read; one sentence."""


# ---- the golden micro-model of MAE ----

# norm_pix: loss, L2 norm of all gradients
GOLDEN = {False: (0.5125649486173123, 0.18690577743774228), True: (1.0056227797735364, 0.25950250193894425)}


class Replay:
    """Recorded numbers in the place of random ones."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __call__(self, name, rows, columns):
        return self.numbers[name]

    def order(self, name, count):
        return self.numbers[name]

    def targets(self):
        return self.numbers["targets"]

    def for_teacher(self, images):
        return self.numbers.get("images_teacher", images)


def golden_model(norm_pix, attention):
    """Every parameter value is a sine of its place; the position tables stay."""
    model = Mae(32, 8, (16, 2, 4), (8, 1, 2), attention, norm_pix).double()
    for j, (name, value) in enumerate(model.state_dict().items()):
        if "pos_embed" not in name:
            i = torch.arange(value.numel(), dtype=torch.float64)
            norm_weight = "norm" in name and name.endswith("weight")
            value.copy_((0.1 * (0.37 * i + 1.3 * j).sin() + norm_weight).reshape(value.shape))
    return model


def golden():
    at = torch.arange(3 * 32 * 32, dtype=torch.float64)
    images = torch.stack([(0.05 * at + n).sin().reshape(3, 32, 32) for n in range(2)])
    place = torch.arange(1, 17, dtype=torch.float64)
    noise = torch.stack([(0.6180339887 * place * k).frac() for k in (1, 2)])
    for norm_pix, (variant, attention) in itertools.product(GOLDEN, ATTENTION.items()):
        model = golden_model(norm_pix, attention)
        loss = model(images, Replay({"noise": noise}))
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
        line = f"mae, golden micro-model, norm_pix={norm_pix} attention={variant}: loss {loss.item():.16g}, gradient norm {norm:.16g}"
        if not all(math.isclose(got, x, rel_tol=1e-11) for got, x in zip((loss.item(), norm), GOLDEN[norm_pix])):
            want = GOLDEN[norm_pix]
            raise Wrong(f"the golden micro-model gives loss {want[0]} and gradient norm {want[1]}, not {line}.")
        yield line


# ---- recorded cases ----


class Case:
    """A file of tensors and the sizes they belong to."""

    def __init__(self, folder, name):
        self.name, path = name, folder / f"{name}.safetensors"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Wrong(f"the recorded case {path} cannot be read: {error.strerror}; run this in a checkout of the repository.")
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        case = json.loads(header.pop("__metadata__")["case"])
        self.model, self.teacher, self.options = case["model"], case["teacher"], case["options"]
        self.tensors = {}
        for key, entry in header.items():
            begin, end = (8 + length + at for at in entry["data_offsets"])
            tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=TYPES[entry["dtype"]]).reshape(entry["shape"])
            self.tensors[key] = tensor.double() if tensor.is_floating_point() else tensor

    def __getitem__(self, key):
        return self.tensors[key]

    def under(self, prefix):
        return {key[len(prefix) :]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def load(self, model, only=None):
        """Official weights; what a model lacks is a teacher's that stops earlier, or not among `only`."""
        given = {**self.under("w/"), **{f"teacher.{key}": tensor for key, tensor in self.under("tw/").items()}}
        own = model.state_dict()
        if only:
            given = {key: tensor for key, tensor in given.items() if key.startswith(only)}
        given = {key: tensor for key, tensor in given.items() if key in own or not key.startswith("teacher.")}
        missing = [key for key in own if key not in given and (only is None or key.startswith(only))]
        if missing or set(given) - set(own):
            raise Wrong(f"{self.name}: the weights do not fit the model: {missing or sorted(set(given) - set(own))}.")
        model.load_state_dict(given, strict=False)
        return model

    def close(self, what, got, want, allowed):
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= allowed:
            raise Wrong(f"{self.name}: {what} is {error:.1e} of its largest number off, and {allowed:g} is allowed.")
        return error

    def compare(self, model, loss, allowed=ROUNDED, only=None):
        """Loss and the gradient of every parameter; those that the case gives none get none."""
        loss.backward()
        worst = self.close("the loss", loss.detach(), self["out/loss"], allowed)
        wanted, found = self.under("grad/"), 0
        for name, parameter in model.named_parameters():
            if only and not name.startswith(only):
                continue
            if (parameter.grad is None) != (name not in wanted):
                raise Wrong(f"{self.name}: {name} has a gradient on one side alone.")
            if parameter.grad is None:
                continue
            found += 1
            if name.endswith("attn.qkv.bias"):
                # The part of the keys is 0 but for rounding.
                keep = torch.arange(len(wanted[name])) // (len(wanted[name]) // 3) != 1
                worst = max(worst, self.close(name, parameter.grad[keep], wanted[name][keep], allowed))
            else:
                worst = max(worst, self.close(name, parameter.grad, wanted[name], allowed))
        return f"{self.name}: loss {loss.item():.9g} and {found} gradients agree to {worst:.0e} (allowed {allowed:g})"


def sizes(config):
    return config["embed_dim"], config["depth"], config["num_heads"]


def decoder(config):
    return config["decoder_embed_dim"], config["decoder_depth"], config["decoder_num_heads"]


def network(config, attention, **more):
    return Vit(config["image_size"], config["patch_size"], sizes(config), attention, mlp_ratio=config["mlp_ratio"], **more)


def autoencoder(kind, case, attention, **more):
    model, options = case.model, case.options
    own = model["image_size"], model["patch_size"], sizes(model), decoder(model), attention
    return kind(*own, options["norm_pix_loss"], options["mask_ratio"], mlp_ratio=model["mlp_ratio"], **more)


def mae(case, attention):
    model = case.load(autoencoder(Mae, case, attention).double())
    return case.compare(model, model(case["in/images"], Replay({"noise": case["in/noise"]})))


def dmae(case, attention):
    teacher = network(case.teacher, attention)
    [block], [teacher_block] = case.options["aligned_blks_indices"], case.options["teacher_aligned_blks_indices"]
    model = autoencoder(Dmae, case, attention, teacher=teacher, block=block, teacher_block=teacher_block).double()
    case.load(model).teacher.requires_grad_(False)
    return case.compare(model, model(case["in/images"], Replay({"noise": case["in/noise"]})))


def maskedkd(case, attention):
    model, classes = case.model, case.model["num_classes"]
    teacher = network(case.teacher, attention, classes=classes)
    own = model["image_size"], model["patch_size"], sizes(model), attention
    model = MaskedKd(*own, teacher=teacher, keep=case.options["len_keep"], classes=classes, mlp_ratio=model["mlp_ratio"]).double()
    case.load(model).teacher.requires_grad_(False)
    return case.compare(model, model(case["in/images"], Replay({"targets": case["in/targets"]})))


def tinymim(case, attention):
    model, block = case.model, case.options["teacher_block"]
    own = model["image_size"], model["patch_size"], sizes(model), attention
    more = {"last_heads": model["last_heads"], "mlp_ratio": model["mlp_ratio"]}
    model = Tinymim(*own, teacher=network(case.teacher, attention), teacher_block=block, **more).double()
    case.load(model).teacher.requires_grad_(False)
    return case.compare(model, model(case["in/images"], Replay({"images_teacher": case["in/images_teacher"]})))


def dmjd(case, attention):
    config, options = case.model, case.options
    ids, restore, mask = disjoint_masks(case["in/noise"], options["len_keep"], case["in/perm_disj"], case["in/perm_joint"])
    for what, got in (("ids_keep", ids), ("ids_restore", restore), ("mask", mask)):
        if not torch.equal(got, case[f"out/{what}"].to(got.dtype)):
            raise Wrong(f"{case.name}: {what} of the two views differ.")
    size = config["embed_dim"][2], 1, config["num_heads"]
    image, patch = config["image_size"][0], math.prod(config["patch_size"])
    own = image, patch, size, decoder(config), attention, False, options["mask_ratio"]
    model = Dmjd(*own, out=config["decoder_pred_dim"], class_token=False, mlp_ratio=config["decoder_mlp_ratio"]).double()
    only = "mask_token", "decoder_", "proj_embed.", "predictor."
    case.load(model, only)
    hidden, shown = model.loss_of(case["out/latent"], case["out/target"], ids, restore, mask)
    case.close("the loss of hidden patches", hidden.detach(), case["out/loss_mim"], FROM_ROUNDED)
    case.close("the loss of visible patches", shown.detach(), case["out/alt_loss_vis_aligned"], FROM_ROUNDED)
    return case.compare(model, hidden + shown, FROM_ROUNDED, only)


CASES = {
    "mae": [("mae_r75_normpix", mae)],
    "dmae": [("dmae_fc_L1_normpix", dmae)],
    "maskedkd": [("maskedkd_soft_keep8", maskedkd)],
    "dmjd": [("mae_r75_plain", mae), ("dmjd_64_aligned_derived", dmjd)],
    "tinymim": [("tinymim_rel_teacher_last", tinymim), ("tinymim_rel_depth12", tinymim)],
}


def check(methods, folder):
    """A line for each comparison that agrees; the first that does not is an error."""
    if "mae" in methods:
        yield from golden()
    for method in methods:
        for (name, compare), (variant, attention) in itertools.product(CASES[method], ATTENTION.items()):
            yield f"{method}, {variant} attention, {compare(Case(folder, name), attention)}"
