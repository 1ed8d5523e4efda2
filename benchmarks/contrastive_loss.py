"""Time and memory of the Wasserstein loss of all pairs of a batch, and of the cosine loss of several layers.

Every method computes the distances of B texts (8 to 40 tokens) and B utterances (20 to 120 tokens) and the gradient of
their sum at the utterances; the texts need none, as in pretraining. The methods take turns, so that a busy machine slows
all of them, and the fastest of equally many runs counts.

    ours            wasserstein_distance_matrix, all layers in one call, as the loss calls it
    products alone  the matrix products that ours cannot do without, over valid tokens only
    GeomLoss loop   one SamplesLoss call for each pair, as the paper's code has it (with the diameter given)
    POT loop        one ot.emd2 call for each pair: exact transport, another quantity
    POT batch       ot.solve_batch: Sinkhorn for all pairs at once, padded, its last step differentiated
    flash-sinkhorn  one call for each pair, on a GPU, if the package is installed

Peak memory is that of fresh processes (Linux, CPU: growth of the peak resident size during forward and backward) or of
torch's allocator (GPU).
"""

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ot
import torch
from geomloss import SamplesLoss
from torch.nn import functional as F

from speechllm.objectives import cosine_similarity_matrix, wasserstein_distance_matrix
from speechllm.objectives.layers import layer_similarities, negative_wasserstein


BLUR = 0.05
LARGEST_BATCH_SOLVE = 2e9  # bytes of one padded cost matrix of all pairs, times the copies that solve_batch keeps
# (batch, dim, layers) -> times faster than the GeomLoss loop
TARGETS = {(16, 576, 1): 25, (32, 576, 1): 35, (64, 576, 1): 45, (10, 4096, 1): 15, (16, 576, 7): 25}
PRODUCTS_TARGET, COSINE_TARGET = 2.0, 3.0
PAPER = (20, 4096, 7)  # batch, dim, layers
Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_sides(batch: int, dim: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Sides:
    """Texts of 8 to 40 tokens and utterances of 20 to 120, with their masks."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for shortest, longest in ((8, 40), (20, 120)):
        lengths = torch.randint(shortest, longest + 1, (batch,), generator=generator)
        states = torch.randn(batch, int(lengths.max()), dim, generator=generator)
        sides += [states.to(device, dtype), (torch.arange(states.shape[1]) < lengths[:, None]).to(device)]
    return tuple(sides)


def random_layers(batch: int, dim: int, layers: int, device: str, dtype: torch.dtype) -> list[Sides]:
    """States of several layers, which share their masks."""
    text, text_mask, speech, speech_mask = random_sides(batch, dim, device, dtype=dtype)
    torch.manual_seed(0)
    further = [(torch.randn_like(text), text_mask, torch.randn_like(speech), speech_mask) for _ in range(layers - 1)]
    return [(text, text_mask, speech, speech_mask), *further]


# ---- methods: functions of the sides -> (B_text, B_speech) ------------------------------------------------------------


def by_pair(distance: Callable) -> Callable:
    def matrix(text, text_mask, speech, speech_mask):
        x = [F.normalize(states[mask], dim=-1) for states, mask in zip(text, text_mask)]
        y = [F.normalize(states[mask], dim=-1) for states, mask in zip(speech, speech_mask)]
        return torch.stack([torch.stack([distance(a, b) for b in y]) for a in x])

    return matrix


def emd2(x, y):
    return ot.emd2(x.new_tensor([]), y.new_tensor([]), 1 - x @ y.T)


def pot_batch(text, text_mask, speech, speech_mask):
    weights = [mask / mask.sum(1, keepdim=True) for mask in (text_mask, speech_mask)]
    x, y = F.normalize(text, dim=-1), F.normalize(speech, dim=-1)
    cost = 1 - torch.einsum("ind,jmd->ijnm", x, y).flatten(0, 1)
    a = weights[0].repeat_interleave(len(speech), 0).clamp(min=1e-30)
    b = weights[1].repeat(len(text), 1).clamp(min=1e-30)
    solved = ot.solve_batch(cost, BLUR**2, a, b, max_iter=100, method="log_sinkhorn", grad="envelope")
    return solved.value.view(len(text), len(speech))


def cosine_by_sequence(text, text_mask, speech, speech_mask):
    x = F.normalize(torch.stack([states[mask].mean(0) for states, mask in zip(text, text_mask)]), dim=-1)
    y = F.normalize(torch.stack([states[mask].mean(0) for states, mask in zip(speech, speech_mask)]), dim=-1)
    return x @ y.T


GEOMLOSS = by_pair(SamplesLoss("sinkhorn", p=2, blur=BLUR, diameter=2.0))
MEASURED = {"ours": wasserstein_distance_matrix, "GeomLoss loop": GEOMLOSS}


def step(method: Callable, layers: list[Sides]) -> Callable[[], None]:
    """Forward and backward of all layers."""

    def run():
        for text, text_mask, speech, speech_mask in layers:
            speech = speech.detach().requires_grad_()
            method(text, text_mask, speech, speech_mask).sum().backward()

    return run


def step_together(layers: list[Sides]) -> Callable[[], None]:
    """Forward and backward of ours, all layers in one call, as `layerwise_contrastive_loss` has it."""
    text_mask, speech_mask = layers[0][1::2]
    states = {layer: sides[::2] for layer, sides in enumerate(layers)}

    def run():
        speech = {layer: utterances.detach().requires_grad_() for layer, (_, utterances) in states.items()}
        texts = {layer: texts for layer, (texts, _) in states.items()}
        layer_similarities(negative_wasserstein, (texts, text_mask), (speech, speech_mask)).sum().backward()

    return run


def products_alone(layers: list[Sides]) -> Callable[[], None]:
    """The products of the Gram matrices and of the gradient at the utterances, over valid tokens."""
    packed = []
    for text, text_mask, speech, speech_mask in layers:
        x, y = text[text_mask], speech[speech_mask]
        packed.append((x, y, x.split(text_mask.sum(1).tolist()), y.split(speech_mask.sum(1).tolist())))

    def run():
        for x, y, texts, utterances in packed:
            gram = x @ y.T
            gram.T @ x
            for tokens in texts:
                tokens @ tokens.T
            for tokens in utterances:
                (tokens @ tokens.T) @ tokens

    return run


# ---- measuring --------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest(methods: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each method, which take turns."""
    for run in methods.values():
        run()  # warm-up
    times = [{name: seconds(run, device) for name, run in methods.items()} for _ in range(rounds)]
    return {name: min(taken[name] for taken in times) for name in methods}


def peak_megabytes(method: str, batch: int, dim: int, device: str) -> float:
    """Growth of the peak by one forward and backward, in a process of its own on CPUs."""
    if device != "cpu":
        sides = random_sides(batch, dim, device)
        step(MEASURED[method], [sides])()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(MEASURED[method], [sides])()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    context = multiprocessing.get_context("spawn")  # a forked child would reuse freed memory of its parent
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_growth, args=(sender, method, batch, dim))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"The process that measures memory ended with code {child.exitcode}; see its message above.")
    return receiver.recv()


def _report_growth(sender, name: str, batch: int, dim: int) -> None:
    torch.set_num_threads(1)
    method = MEASURED[name]  # spawned processes are sent names, as closures cannot be pickled
    step(method, [random_sides(2, 32, "cpu")])()  # what libraries allocate once
    sides = random_sides(batch, dim, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    status = Path("/proc/self/status")
    size = {line.split()[0]: int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("Vm")}
    step(method, [sides])()
    peak = {line.split()[0]: int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("Vm")}
    sender.send((peak["VmHWM:"] - size["VmRSS:"]) * 1024 / 1e6)


def measure(batch: int, dim: int, layers: int, device: str, dtype: torch.dtype, quick: bool) -> dict:
    sides = random_layers(batch, dim, layers, device, dtype)
    methods = {
        "ours": step_together(sides),
        "products alone": products_alone(sides),
        "GeomLoss loop": step(GEOMLOSS, sides),
    }
    notes = {"GeomLoss loop": _deviation(GEOMLOSS, sides[0])}
    if dtype == torch.float32:
        methods["POT loop"] = step(by_pair(emd2), sides)
        size = 4 * sides[0][0].shape[1] * sides[0][2].shape[1] * batch**2 * 100  # what 100 iterations may store
        if size <= LARGEST_BATCH_SOLVE:
            methods["POT batch"] = step(pot_batch, sides)
        else:
            notes["POT batch"] = f"skipped: it may store {size / 1e9:.0f} GB"
    if device != "cpu":
        flash = _flash_sinkhorn()
        if flash is None:
            notes["flash-sinkhorn"] = "skipped: not installed"
        else:
            methods["flash-sinkhorn"] = step(by_pair(flash), sides)
            notes["flash-sinkhorn"] = _deviation(by_pair(flash), sides[0])
    times = fastest(methods, 1 if quick else 5, device)
    ratios = {"products alone": ratio(times["ours"] / times["products alone"], PRODUCTS_TARGET, at_most=True)}
    for name in methods.keys() - {"ours", "products alone"}:
        # The targets are those of one thread of a CPU, in float32.
        wanted = name == "GeomLoss loop" and device == "cpu" and dtype == torch.float32
        ratios[name] = ratio(times[name] / times["ours"], TARGETS.get((batch, dim, layers)) if wanted else None)
    return {"batch": batch, "dim": dim, "layers": layers, "dtype": str(dtype).removeprefix("torch."), "seconds": times,
            "ratios": ratios, "notes": notes}  # fmt: skip


def _deviation(method: Callable, sides: Sides) -> str:
    with torch.no_grad():
        found, ours = method(*sides).float(), wasserstein_distance_matrix(*sides).float()
    return f"deviates from ours by {(found - ours).abs().max():.1e} at most"


def _flash_sinkhorn() -> Callable | None:
    try:
        from flash_sinkhorn import SamplesLoss as FlashLoss
    except ImportError:
        return None
    return FlashLoss(
        "sinkhorn", blur=BLUR, debias=True, half_cost=True
    )  # half of the squared distance, as GeomLoss's p=2


def measure_cosine(batch: int, dim: int, layers: int, device: str, dtype: torch.dtype, quick: bool) -> dict:
    sides = random_layers(batch, dim, layers, device, dtype)
    methods = {"ours": step(cosine_similarity_matrix, sides), "by sequence": step(cosine_by_sequence, sides)}
    times = fastest(methods, 5 if quick else 30, device)
    ratios = {"by sequence": ratio(times["by sequence"] / times["ours"], COSINE_TARGET)}
    return {"batch": batch, "dim": dim, "layers": layers, "seconds": times, "ratios": ratios, "notes": {}}


def ratio(value: float, target: float | None, at_most: bool = False) -> dict:
    """How many times faster ours is; `at_most`: how many times as long it takes."""
    found = {"value": value}
    if target is not None:
        found |= {"target": target, "at_most": at_most, "met": value <= target if at_most else value >= target}
    return found


def print_case(title: str, case: dict) -> None:
    print(f"\n{title}B={case['batch']} D={case['dim']} layers={case['layers']}")
    for name, taken in case["seconds"].items():
        line = f"  {name:16}{1e3 * taken:10.1f} ms"
        if found := case["ratios"].get(name):
            line += f"   ours {'takes' if found.get('at_most') else 'is   '} {found['value']:5.1f}x"
            line += "" if found.get("at_most") else " faster"
            if "target" in found:
                sign, met = "<=" if found["at_most"] else ">=", "met" if found["met"] else "NOT met"
                line += f"  (target {sign} {found['target']:g}x: {met})"
        print(line)
    for name, note in case["notes"].items():
        print(f"  {name:16}{note}")
    sys.stdout.flush()


def measure_memory(batch: int, dim: int, device: str) -> dict:
    """Peaks in MB, against the target: the loop's and one cost matrix."""
    peaks = {name: peak_megabytes(name, batch, dim, device) for name in MEASURED}
    text_mask, speech_mask = random_sides(batch, dim, "cpu")[1::2]
    cost_matrix = 4 * int(text_mask.sum()) * int(speech_mask.sum()) / 1e6
    allowed = peaks["GeomLoss loop"] + cost_matrix
    met = peaks["ours"] <= allowed
    print(
        f"  peak memory     ours {peaks['ours']:.1f} MB, GeomLoss loop {peaks['GeomLoss loop']:.1f} MB, one cost matrix "
        f"{cost_matrix:.1f} MB  (target <= {allowed:.1f} MB: {'met' if met else 'NOT met'})"
    )
    return {**peaks, "one cost matrix": cost_matrix, "target": allowed, "met": met}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contrastive_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="For figures to compare: OMP_NUM_THREADS=1, on a core that has nothing else to do.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        default=Path("runs/benchmarks/contrastive_loss.json"),
        help="where times, ratios, machine and versions go (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the states (default: bfloat16 on a GPU, else float32)"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest case only, one round")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on CPUs (default: 1)")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="B,D,LAYERS",
        help=f"which cases (default: {' '.join(','.join(map(str, case)) for case in TARGETS)}; on a GPU the paper's, "
        f"{','.join(map(str, PAPER))}, as well)",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))
    cases = [*TARGETS, *([PAPER] if device != "cpu" else [])]
    if options.cases:
        cases = [tuple(map(int, case.split(","))) for case in options.cases]
    if options.quick and not options.cases:
        cases = cases[:1]

    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "versions": {name: installed(name) for name in ("torch", "geomloss", "POT", "flash-sinkhorn", "numpy")},
        "settings": dict(blur=BLUR, scaling=0.5, diameter=2.0, text_tokens=[8, 40], speech_tokens=[20, 120]),
        "wasserstein": [],
    }
    for batch, dim, layers in cases:
        case = measure(batch, dim, layers, device, dtype, options.quick)
        print_case("", case)
        if layers == 1 and (device != "cpu" or sys.platform == "linux"):
            case["peak_megabytes"] = measure_memory(batch, dim, device)
        result["wasserstein"].append(case)
    result["cosine"] = measure_cosine(16, 576, 7, device, dtype, options.quick)
    print_case("cosine, ", result["cosine"])

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nWritten to {options.output}")
    return result


if __name__ == "__main__":
    main()
