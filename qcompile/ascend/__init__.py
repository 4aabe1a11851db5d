"""The Ascend back end: chips, the operator table, legality, ATC, the .om reader and what a machine can do."""
