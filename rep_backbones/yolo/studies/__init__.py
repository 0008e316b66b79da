"""What `tools/study.py` trains and compares: `plan` says what, `one` is one run, `costs` and `page` what is told of them."""
