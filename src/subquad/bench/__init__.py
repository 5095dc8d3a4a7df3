"""Benchmarks: one room a method, correctness first, results as JSON, tables generated from them.

A bench room is a module ``subquad/bench/<family>/<slug>.py`` with one function. It sets up its sizes, proves that
what it times is right, and records figures; everything else is the harness's::

    def run(bench: Bench) -> None:
        b, t, h, k = bench.size((8, 4096, 8, 64), smoke=(1, 65, 2, 8))
        q, k_, v = (torch.randn(b, t, h, k, **bench.factory) for _ in range(3))
        exact = naive(q.double(), k_.double(), v.double())
        bench.gate("chunked equals the equation", chunked(q, k_, v), exact, naive=naive(q, k_, v))
        bench.compare(
            "fwd.t4096", chunked, attention, baseline_name="causal SDPA", inputs=(q, k_, v), tokens=b * t,
            flops=4 * b * h * t * k * k, moved=4 * q.nbytes, shape={"b": b, "t": t, "h": h, "k": k},
        )
        bench.value("state", state.nbytes, "bytes", "lower", baseline="key/value cache", baseline_value=cache.nbytes)

``compare`` times what a user waits for, launches included; kernels race without them, by ``bench.race`` and
``bench.speed``, in the rooms of the family ``ops``, which share `subquad.bench.scans` and `subquad.bench.decoding`.

``subquad bench mixers/mamba2`` runs it and writes ``bench/results/mixers.mamba2.<device>.json``, and charts over length
beside it where there is something to draw; ``--smoke`` runs it at the small sizes and writes nothing.
`subquad.bench.results` holds the file format, `subquad.bench.tables` the tables, `subquad.bench.plots` the charts.
"""
