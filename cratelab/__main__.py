from cratelab.cli import main

main()
