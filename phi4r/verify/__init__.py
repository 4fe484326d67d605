"""Is this answer right? Extraction, exact comparison, and worker processes for symbolic comparison.

    extract.py   where the answer stands: after `</think>`, in the last `\\boxed{}` (text only)
    strict.py    the tiers: string -> exact rational -> complexity gate -> grammar -> math-verify; verdicts
    notation.py  one notation for the same text
    numbers.py, units.py, scalars.py    numbers and units, read exactly
    nodes.py, reading.py    the grammar of answers: lists, tuples, intervals, equations, options, words
    equality.py  whether two readings say the same: the one equality of reward, votes and curation
    pool.py      `VerifierPool`: workers with a hard deadline and a memory limit, killed and replaced
    audit.py     a second, independent check of verdicts, and where the two disagree
    numeric.py   answers compared by their values, without sympy: what checks math-verify
    worker.py    the program a worker runs (`python -m phi4r.verify.worker`)
    sandbox.py   programs of a model, under bubblewrap
    cli.py       `phi4r verify` and `phi4r reward`: JSONL in, JSONL out

Nothing here imports torch, and only a worker process ever imports sympy or math-verify: a hostile answer
can make those run for ever, so they never run in the caller's process.
"""
