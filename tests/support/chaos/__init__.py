"""What the chaos tests stand on: books, judge, an application, a next hop, faults, and the campaign that mixes them."""
