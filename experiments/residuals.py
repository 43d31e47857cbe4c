"""`python -m experiments.residuals suite=...`: does a merge's residual predict its accuracy?"""

from experiments.cli import entry

main = entry("residuals")

if __name__ == "__main__":
    main()
