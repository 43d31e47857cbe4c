"""`python -m experiments.analyse suite=...`: the conditions behind ACTMat on real fine-tuning."""

from experiments.cli import entry

main = entry("analyse")

if __name__ == "__main__":
    main()
