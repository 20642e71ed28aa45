"""Answers as `benchmarks/driver.py` does, but from NumPy, and as wrongly as its first argument says."""

import json
import sys
import time
from pathlib import Path

import numpy as np

BEHAVIOUR = sys.argv[1]


def load(case, answers):
    w, b, x, d = (np.load(Path(case, f"{name}.npy")) for name in "wbxd")
    results = {"y": x @ w.T + b, "dx": d @ w, "dw": (d.T @ x)[w != 0]}
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
            reply = {"load": load, "time": seconds}[do](**request)
        print("chatter" if BEHAVIOUR == "chatters" else json.dumps(reply), flush=True)


main()
