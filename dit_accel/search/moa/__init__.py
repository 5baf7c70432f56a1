"""MoA's elastic rules as a search: near sets that grow with the size, found at some sizes, used at others."""
