"""`dlrm bench`: how long each backend takes, interleaved in separate processes, and where the time goes.

    plan.py        what is to be timed          worker.py      the process of one backend
    group.py       one spec, all backends       process.py     its handle: requests, memory, processor time
    statistics.py  medians, intervals, ratios   checking.py    the judgement that comes before any time
    operators.py   names common to all engines  floor.py, ceilings.py   the least that a step can take here
    report.py      bench.json                   console.py, html.py, plots.py, compare.py   what is made of it
"""
