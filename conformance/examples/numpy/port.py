"""A DLRM in float32 NumPy that knows nothing but SPEC.md and a bundle's files: a port to start from, or to test with.

    dlrm conform tiny --write-bundle bundle
    python port.py bundle numpy       # writes bundle/results/numpy
    python bundle/judge.py

Python 3.11 and NumPy; nothing of dlrm-parity is imported.
"""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np

f32 = np.float32
FLOOR = f32(1e-20)


def sigmoid(z):
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, f32(1), e) / (f32(1) + e)


def tables_of(spec):
    """One entry a table, in order: an entry of the file may list the rows of several."""
    return [entry for entry in spec["tables"] for _ in np.atleast_1d(entry["rows"])]


def forward(spec, w, batch):
    """Every activation, by its name in SPEC.md, 2."""
    t = {}
    x = mlp(t, spec, w, "bottom", batch["dense"])
    vectors = [x]
    for n, table in enumerate(tables_of(spec)):
        rows, lengths = batch[f"tables.{n}.indices"], batch[f"tables.{n}.lengths"]
        terms = w[f"tables.{n}.weight"][rows]
        if f"tables.{n}.pooling" in w:
            terms = terms * w[f"tables.{n}.pooling"][rows][:, None]
        pooled = np.zeros((len(lengths), terms.shape[1]), f32)
        np.add.at(pooled, np.repeat(np.arange(len(lengths)), lengths), terms)
        if table["pooling"] == "mean":
            pooled *= (f32(1) / np.maximum(lengths, 1).astype(f32))[:, None]
        t[f"tables.{n}.pooled"] = pooled
        vectors.append(pooled)
    if spec["interaction"]["kind"] == "cat":
        output = np.concatenate(vectors, 1)
    else:
        z = t["interaction.features"] = np.stack(vectors, 1)
        products = t["interaction.products"] = z @ z.transpose(0, 2, 1)
        i, j = pairs(spec, len(vectors))
        output = np.concatenate([vectors[0], products[:, i, j]], 1)
    t["interaction.output"] = output
    mlp(t, spec, w, "top", output)
    t["loss"] = loss(spec["loss"], t, last(spec), batch["label"])[0]
    return t


def mlp(t, spec, w, name, x):
    for layer in range(len(spec[name]["widths"])):
        z = t[f"{name}.{layer}.preactivation"] = x @ w[f"{name}.{layer}.weight"].T + w[f"{name}.{layer}.bias"]
        if f"{name}.{layer}.preactivation" == last(spec):
            x = t["probability"] = sigmoid(z)
        else:
            x = np.maximum(z, 0) if spec[name]["activation"] == "relu" else sigmoid(z)
            t[f"{name}.{layer}.activation"] = x
    return x


def last(spec):
    return f"top.{len(spec['top']['widths']) - 1}.preactivation"


def pairs(spec, vectors):
    return np.tril_indices(vectors, 0 if spec["interaction"]["self_interaction"] else -1)


def loss(rule, t, logit, y):
    """(the mean over the batch, its derivative by `probability`, by the logit where that comes first)."""
    p, z, n = t["probability"], t[logit], f32(len(y))
    if rule["kind"] == "mse":
        return np.mean((p - y) ** 2), 2 * (p - y) / n, None
    if rule["kind"] == "bce_logits":
        terms = y * np.logaddexp(f32(0), -z) + (1 - y) * np.logaddexp(f32(0), z)
        return np.mean(terms), None, np.where(y > 0, -y * sigmoid(-z), 0) / n + (1 - y) * sigmoid(z) / n
    inside, positive = np.ones_like(p), y == 1
    if rule["clip"]:
        low, high = f32(rule["clip"]), f32(1) - f32(rule["clip"])
        inside = ((p > low) & (p < high)).astype(f32)
        p = np.clip(p, low, high)
    q = np.maximum(np.where(positive, p, 1 - p), FLOOR)
    weight = np.where(positive, *(f32(x) for x in reversed(rule.get("weights", (1, 1)))))
    return np.mean(-weight * np.log(q)), inside * np.where(positive, -weight, weight) / q / n, None


def backward(spec, w, batch, t):
    """Every gradient, by name; of a table the slice: indices, and one value for each lookup."""
    g = {}
    _, g_probability, g_logit = loss(spec["loss"], t, last(spec), batch["label"])
    if g_logit is None:
        g["probability_grad"] = g_probability
        g_logit = g_probability * t["probability"] * (1 - t["probability"])
    g_output = g["interaction.output_grad"] = mlp_backward(g, spec, w, t, "top", t["interaction.output"], g_logit)
    tables, e = tables_of(spec), spec["embedding_dim"]
    if spec["interaction"]["kind"] == "cat":
        vectors = np.split(g_output, len(tables) + 1, 1)
    else:
        i, j = pairs(spec, len(tables) + 1)
        products = g["interaction.products_grad"] = np.zeros_like(t["interaction.products"])
        products[:, i, j] = g_output[:, e:]
        features = g["interaction.features_grad"] = (
            (products + products.transpose(0, 2, 1)) @ t["interaction.features"])
        vectors = [g_output[:, :e] + features[:, 0], *features.transpose(1, 0, 2)[1:]]
    for n, table in enumerate(tables):
        pooled = g[f"tables.{n}.pooled_grad"] = vectors[n + 1]
        rows, lengths = batch[f"tables.{n}.indices"], batch[f"tables.{n}.lengths"]
        values = np.repeat(pooled, lengths, 0)
        if table["pooling"] == "weighted_learned":
            g[f"tables.{n}.pooling_grad_values"] = (values * w[f"tables.{n}.weight"][rows]).sum(1)
            g[f"tables.{n}.pooling_grad_indices"] = rows
        if table["pooling"] == "mean":
            values = values * (f32(1) / np.repeat(lengths, lengths).astype(f32))[:, None]
        elif f"tables.{n}.pooling" in w:
            values = values * w[f"tables.{n}.pooling"][rows][:, None]
        g[f"tables.{n}.weight_grad_values"], g[f"tables.{n}.weight_grad_indices"] = values, rows
    mlp_backward(g, spec, w, t, "bottom", batch["dense"], vectors[0])
    return g


def mlp_backward(g, spec, w, t, name, x, dy):
    for layer in reversed(range(len(spec[name]["widths"]))):
        this = f"{name}.{layer}"
        if f"{this}.preactivation" != last(spec):
            g[f"{this}.activation_grad"] = dy
            y = t[f"{this}.activation"]
            dy = np.where(y > 0, dy, 0) if spec[name]["activation"] == "relu" else dy * y * (1 - y)
        g[f"{this}.preactivation_grad"] = dy
        before = t[f"{name}.{layer - 1}.activation"] if layer else x
        g[f"{this}.weight_grad"], g[f"{this}.bias_grad"] = dy.T @ before, dy.sum(0)
        dy = dy @ w[f"{this}.weight"]
    return dy


def update(case, w, h, g):
    """New parameters and state after one step of `case` (SPEC.md, 7). `h` is empty under sgd."""
    rate, eps = f32(case["learning_rate"]), f32(case.get("eps", 0))
    w, h = dict(w), dict(h)
    for name in w:
        rows = slice(None)
        if f"{name}_grad" in g:
            gradient = g[f"{name}_grad"]
        elif f"{name}_grad_values" in g:  # sum what belongs to the same row first
            rows, place = np.unique(g[f"{name}_grad_indices"], return_inverse=True)
            gradient = np.zeros((len(rows), *w[name].shape[1:]), f32)
            np.add.at(gradient, place, g[f"{name}_grad_values"])
        else:
            continue  # fixed weights are not trained
        w[name] = w[name].copy()
        if not h:
            w[name][rows] -= rate * gradient
            continue
        moment = h[f"{name}.moment"] = h[f"{name}.moment"].copy()
        rowwise = moment.ndim < w[name].ndim
        moment[rows] += (gradient**2).mean(1) if rowwise else gradient**2
        root = np.sqrt(moment[rows]) + eps
        w[name][rows] -= rate * gradient / (root[:, None] if rowwise else root)
    return w | h


def main(bundle, results):
    spec = tomllib.loads((bundle / "spec.toml").read_text())
    for case in json.loads((bundle / "manifest.json").read_text())["cases"]:
        w, batch, h = (read(bundle / case[key]) if case[key] else {} for key in ("parameters", "batch", "state"))
        t = forward(spec, w, batch)
        g = backward(spec, w, batch, t)
        if case["group"] == "forward":
            write(results / "forward", t)
        elif case["group"] == "backward":
            write(results / "backward", g)
        else:
            write(results / case["name"], update(case, w, h, g) | {"loss": t["loss"]})


def read(folder):
    return {path.name.removesuffix(".npy"): np.load(path) for path in folder.glob("*.npy")}


def write(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[1]) / "results" / sys.argv[2])
