"""From a goal alone: which recipes are tried, in what order, for how long, and which artifact wins.

`penjing.search.compress` is what users call. `space` says what may vary for a network and its data, `beliefs` predicts
what a choice gives before it is tried and learns from what was measured, `study` keeps the trials in an Optuna study,
`trial` carries one out, and `search` goes round until the budget is spent.
"""
