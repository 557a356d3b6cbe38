"""What the tests of two stages compare, where they do not say otherwise."""

ARMS_OF_TWO_STAGES = """
arms:
  dec: {extends: decllm-tiny}
  dec_biattn: {extends: decllm-tiny, finetune: {masks: {prefix: bidirectional}}}
  red: {}
compare: {baseline: dec, metric: finetune/eval/examples/nll}
"""
