"""Evaluation: from repeated runs to numbers, figures and a page a reader can trust.

Lives here: the statistics of repeated runs (`statistics`), the result files of an evaluation (`results`), the
figures (`plots`) and the self-contained HTML report (`report`). May not live here: sampling from a model,
checking an answer (that is `phi4r.tasks`), anything that imports torch. Everything is a pure function of
arrays and plain records, so a run can be re-analysed on a machine without an accelerator, years later, from
its `results.jsonl`.
"""
