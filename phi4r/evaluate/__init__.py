"""Evaluation: from repeated runs to numbers, figures and a page a reader can trust.

Lives here: the statistics of repeated runs (`statistics`), the result files of an evaluation (`results`), the
figures (`plots`), the sentences (`findings`), samples side by side (`sample_pairs`) and the self-contained
HTML page (`report`). All of these are pure functions of arrays and plain records and import no torch, so a
run can be analysed again on a machine without an accelerator, years later, from its `results.jsonl`. Only
`run`, the command, samples from a model. How an answer is checked does not live here: that is `phi4r.tasks`
and `phi4r.verify`.
"""
