"""How accurate are the estimates: plans, compiled records, and the ledger made of them."""
