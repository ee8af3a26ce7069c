"""Times Hugging Face's detectors, eager, for latency.py, which says what is measured.

    python benchmarks/latency_torch.py --model='{"name": "detr", ...}' --size=800x1066 --batch=1 --rounds=10

Needs torch, transformers, scipy and Pillow; nothing of this package, no weights, no network. Prints one line of JSON.
"""

import argparse
import json
import time

from train_step_torch import MEAN, STD, build_model, synchronize, torch

WARM_UP = 2  # rounds that do not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads)
    parser.add_argument("--size")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(**arguments.model).to(device).eval()
    height, width = map(int, arguments.size.split("x"))
    image = torch.randint(0, 256, (arguments.batch, height, width, 3), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    scale = torch.tensor([width, height, width, height], device=device)
    sigmoid = arguments.model["name"] != "detr"

    @torch.inference_mode()
    def detect():
        pixels = (image.permute(0, 3, 1, 2).float() / 255 - mean) / std
        answer = model(pixel_values=pixels)
        center, size = answer.pred_boxes.split(2, dim=-1)
        boxes = torch.cat([center - size / 2, center + size / 2], dim=-1) * scale
        scores = answer.logits.sigmoid() if sigmoid else answer.logits.softmax(-1)[..., :-1]
        best, labels = scores.max(-1)
        order = best.argsort(dim=-1, descending=True)
        return best, labels, boxes, order

    seconds = []
    for number in range(arguments.rounds + WARM_UP):
        start, used = time.perf_counter(), time.process_time()
        detect()
        synchronize(device)
        if number >= WARM_UP:
            seconds.append((time.perf_counter() - start, time.process_time() - used))
    parameters = sum(p.numel() for p in model.parameters())
    stored = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    print(json.dumps({"platform": device.type, "seconds": seconds, "parameters": parameters, "bytes": stored}))


if __name__ == "__main__":
    main()
