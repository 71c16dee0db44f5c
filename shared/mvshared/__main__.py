"""`python -m mvshared`: the command `mvmlx`."""

from mvshared.entry import main

if __name__ == "__main__":
    main()
