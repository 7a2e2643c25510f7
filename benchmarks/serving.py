"""What the registered model costs beside the network: latency of one image, with one thread.

    python benchmarks/serving.py

A ResNet-18 for 224 px is trained for a moment on noise and registered. Then, on one processor, images are answered one
at a time by hand (the same decoder, and the same graph in ONNX Runtime), by the model that MLflow loads, and over HTTP
by ``mlflow models serve``, turn by turn. Printed are medians, and their ratio to those by hand; the exit code is 1
where the loaded model takes more than 1.15 times as long.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from PIL import Image
from tracking_server import free_port

from pipeline.cli import main as pipeline
from pipeline.registry.inference import load_private

MOST = 1.15
SIZE, IMAGES, ROUNDS = 224, 40, 8
_NAME = "serving"
_START = 180.0  # seconds


def write_photographs(folder: Path) -> None:
    """JPEGs of 512 x 384 pixels, as smooth as photographs are, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES // 2):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((512, 384), Image.BICUBIC)
            grain = rng.normal(0, 6, (384, 512, 3))
            pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.jpg", quality=90)


def register(images: Path) -> None:
    """A network that knows nothing, which takes as long as one that does."""
    command = [f"--data.root={images}", "--model.backbone=resnet18", f"--data.image_size={SIZE}", "--quiet"]
    command += ["--trainer.max_epochs=1", "--data.num_workers=0", f"--registered_model_name={_NAME}"]
    with contextlib.redirect_stdout(sys.stderr):
        code = pipeline(["fit", *command])
    if code:
        sys.exit("the model could not be registered")


def by_hand(folder: Path) -> Callable[[bytes], object]:
    """The least that has to be done: decode, resize, run the graph."""
    import onnxruntime

    record = json.loads((folder / "bundle.json").read_text())["preprocessing"]
    decode = load_private(folder / "decode.py").EncodedImage
    preprocessing = load_private(folder / "preprocessing.py").Preprocessing.from_dict(record)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def answer(image: bytes) -> object:
        pixels = preprocessing.prepare(decode(image)).transpose(2, 0, 1)[None]
        return session.run(["probabilities"], {"image": np.ascontiguousarray(pixels)})[0]

    return answer


@contextlib.contextmanager
def served(address: str) -> Iterator[Callable[[bytes], object]]:
    """Asks ``mlflow models serve`` over one connection; it runs on this process' processor."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local"]
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=nowhere, stderr=nowhere)
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def answer(image: bytes) -> object:
        row = [base64.b64encode(image).decode()]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [row]}})
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())["predictions"]

    until = time.monotonic() + _START
    try:
        while True:
            try:
                connection.request("GET", "/ping")
                connection.getresponse().read()
                break
            except OSError:
                connection.close()
                if time.monotonic() > until or process.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(0.2)
        yield answer
    finally:
        connection.close()
        process.terminate()
        process.wait()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path('mlflow.db').resolve()}"
        write_photographs(Path("images"))
        register(Path("images"))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        address = f"models:/{_NAME}@challenger"
        model = mlflow.pyfunc.load_model(address)
        folder = Path(mlflow.artifacts.download_artifacts(f"{address}/artifacts/bundle"))
        with served(address) as over_http:
            ways: dict[str, Callable[[bytes], object]] = {
                "by hand": by_hand(folder),
                "loaded by MLflow": lambda image: model.predict(pd.DataFrame({"image": [image]})),
                "over HTTP": over_http,
            }
            taken = measure(ways, [path.read_bytes() for path in sorted(Path("images").rglob("*.jpg"))])
    ratio = report(taken)
    sys.exit(0 if ratio <= MOST else 1)


def measure(ways: dict[str, Callable[[bytes], object]], images: list[bytes]) -> dict[str, list[float]]:
    """Milliseconds of each way for each image, in an order that is drawn anew each time."""
    order, taken = list(ways), {way: [] for way in ways}
    rng = random.Random(0)
    for number in range(ROUNDS):
        for image in images:
            rng.shuffle(order)
            for way in order:
                started = time.perf_counter()
                ways[way](image)
                if number > 0:  # the first round warms up
                    taken[way].append(1000 * (time.perf_counter() - started))
    return taken


def report(taken: dict[str, list[float]]) -> float:
    """Print what was measured; the ratio of the loaded model to what is done by hand."""
    least = statistics.median(taken["by hand"])
    print(f"one image of 512 x 384 px, network for {SIZE} px, one thread; n = {len(taken['by hand'])} each\n")
    print("| | p50, ms | p95, ms | p50 to that by hand |\n|---|---:|---:|---:|")
    for way, values in taken.items():
        middle, late = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        print(f"| {way} | {middle:.1f} | {late:.1f} | {middle / least:.3f} |")
    ratio = statistics.median(taken["loaded by MLflow"]) / least
    print(f"\nloaded by MLflow: {ratio:.3f}, at most {MOST}: {'met' if ratio <= MOST else 'NOT MET'}")
    return ratio


if __name__ == "__main__":
    main()
