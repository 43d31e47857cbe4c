"""`python -m experiments.factorial suite=...`: every choice of the interference family."""

from experiments.cli import entry

main = entry("factorial")

if __name__ == "__main__":
    main()
