"""`python -m experiments.plan base=... experts.NAME=...`: will it merge, and how?"""

from experiments.cli import entry

main = entry("plan")

if __name__ == "__main__":
    main()
