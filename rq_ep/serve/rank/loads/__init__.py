"""The load of the ranks while serving: its sums, single steps, and which experts were chosen lately."""
