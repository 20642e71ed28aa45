"""Answers as `benchmarks/driver.py` does, but from NumPy, and as wrongly as its first argument says."""

import json
import sys
import time
from pathlib import Path

import numpy as np

BEHAVIOUR = sys.argv[1]


def by_block(matrix, block_shape):
    height, width = block_shape
    rows, columns = (n // size for n, size in zip(matrix.shape, block_shape, strict=True))
    return matrix.reshape(rows, height, columns, width).swapaxes(1, 2)


def load_model(source, size, rules):
    return {}


def load(case, answers, block_shape=(1, 1)):
    w, b, x, d = (np.load(Path(case, f"{name}.npy")) for name in "wbxd")
    live = by_block(d.T @ x, block_shape)[by_block(w, block_shape) != 0]
    results = {"y": x @ w.T + b, "dx": d @ w, "dw": live}
    if BEHAVIOUR in results:
        results[BEHAVIOUR].reshape(-1)[-1] += 0.1
    if BEHAVIOUR == "nan":
        results["y"][0, 0] = np.nan
    if BEHAVIOUR == "shape":
        results["dw"] = results["dw"][:-1]
    if BEHAVIOUR == "nothing":
        return {}
    for name, array in results.items():
        np.save(Path(answers, f"{name}.npy"), array)
    return {}


def seconds(operation, calls):
    if BEHAVIOUR == "dies":
        sys.exit("the fake gives up")
    if BEHAVIOUR == "dies silently":
        sys.exit(3)
    if BEHAVIOUR == "sleeps":
        time.sleep(60)
    if BEHAVIOUR == "short":
        calls -= 1
    return {"seconds": [0.001] * calls}


def main():
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if BEHAVIOUR == "refuses":
            reply = {"error": "ValueError: no"}
        else:
            reply = {"load": load, "load_model": load_model, "time": seconds}[do](**request)
        print("chatter" if BEHAVIOUR == "chatters" else json.dumps(reply), flush=True)


main()
