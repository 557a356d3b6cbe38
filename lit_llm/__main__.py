"""`python -m lit_llm` is `lit-llm`."""

from lit_llm.cli import main

main()
