from blockpruner.cli import main

main()
