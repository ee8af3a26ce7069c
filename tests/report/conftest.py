"""The evaluation of the rectangles that the report's tests show, and a browser."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from configs.base import base
from deperceiver_jax.data import open_source
from deperceiver_jax.evaluation.coco_metric import coco_metric, ground_truth


def some_results(source, seed=0) -> list[dict]:
    """Most boxes found, two of them called another class, and false ones below and above them."""
    rng = np.random.default_rng(seed)
    results = []
    for a in ground_truth(source)["annotations"]:
        if a["id"] % 4:
            box = (np.array(a["bbox"]) + rng.uniform(-2, 2, 4)).tolist()
            category = 50 - a["category_id"] if a["id"] in (2, 5) else a["category_id"]
            entry = {"image_id": a["image_id"], "category_id": category, "bbox": box}
            results.append(entry | {"score": 0.4 + 0.06 * len(results)})
    for image_id in np.asarray(source.image_ids).tolist():
        box = rng.uniform([0, 0, 4, 4], [20, 20, 12, 12]).tolist()
        results.append({"image_id": image_id, "category_id": 20, "bbox": box, "score": float(rng.uniform(0, 0.6))})
    return results


@pytest.fixture(scope="session")
def evaluated(rectangles):
    """`source`, `metrics`, `results` and `config` of an evaluation."""
    config = base()
    config.model = {"num_classes": 2, "name": "detr"}
    config.data.update(rectangles)
    source = open_source(config.data, "validation")
    results = some_results(source)
    metrics = coco_metric(ground_truth(source), results)
    return SimpleNamespace(source=source, metrics=metrics, results=results, config=config)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, driven by selenium; it tells its console and what it loads."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("The report is looked at with Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    yield chromium
    chromium.quit()
