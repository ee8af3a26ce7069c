"""The exact assignment of least total cost without leaving the device, for pods whose hosts are too far or too slow."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from deperceiver_jax.structures import Assignment


def assign_on_device(cost: Float[Array, "L B Q N"], box_valid: Bool[Array, "B N"]) -> Assignment:
    """All layers and images of this device in lockstep. Rows are boxes, or queries where boxes outnumber them."""
    num_queries, num_slots = cost.shape[2], box_valid.shape[1]

    def solve_one(cost, box_valid):  # [Q N], [N]
        crowded = jnp.sum(box_valid) > num_queries
        query = _augment_rows(cost.T, box_valid & ~crowded, jnp.ones(num_queries, bool))
        if num_slots <= num_queries:  # known when compiling: no image can be crowded
            return query
        slot = _augment_rows(cost, jnp.broadcast_to(crowded, (num_queries,)), box_valid)
        from_slot = _invert(slot, num_slots)
        return jnp.where(crowded, from_slot, query)

    query = jax.vmap(jax.vmap(solve_one, in_axes=(0, 0)), in_axes=(0, None))(cost, box_valid)
    return Assignment(jnp.maximum(query, 0), query >= 0)


def _augment_rows(
    cost: Float[Array, "R C"], row_valid: Bool[Array, " R"], column_valid: Bool[Array, " C"]
) -> Int32[Array, " R"]:
    """The column of every valid row, -1 for the others. There must be at least as many valid columns as valid rows.

    Rows enter one by one along the shortest augmenting path (Dijkstra over reduced costs), which keeps the assignment
    of the rows so far optimal. Source: Crouse, "On implementing 2D rectangular assignment algorithms" (2016), the
    algorithm SciPy implements, in float32. Batched, it takes as many steps as the hardest image of each row.
    """
    num_rows, num_columns = cost.shape

    def insert(row, state):
        row_price, column_price, owner, column_of = state
        found = _shortest_path(cost, column_valid, row_price, column_price, owner, row, row_valid[row])
        sink, length, distance, previous, reached = found
        slack = jnp.where(reached, length - distance, 0.0)
        reached_row = jnp.where(reached & (owner >= 0), owner, num_rows)  # num_rows is dropped
        row_price = row_price.at[reached_row].add(slack, mode="drop").at[row].add(length)

        def flip(state):
            owner, column_of, column, _ = state
            new_owner = previous[column]
            next_column = column_of[new_owner]
            return owner.at[column].set(new_owner), column_of.at[new_owner].set(column), next_column, new_owner != row

        state = lax.while_loop(lambda state: state[3], flip, (owner, column_of, sink, row_valid[row]))
        return row_price, column_price - slack, state[0], state[1]

    start = (jnp.zeros(num_rows), jnp.zeros(num_columns), jnp.full(num_columns, -1), jnp.full(num_rows, -1))
    num_steps = jnp.max(jnp.where(row_valid, jnp.arange(num_rows) + 1, 0), initial=0)
    return lax.fori_loop(0, num_steps, insert, start)[3]


def _shortest_path(cost, column_valid, row_price, column_price, owner, row, active):
    """Dijkstra from `row` to the nearest column without an owner.

    Returns that column, the path's length, every column's distance, the row before it, and which columns were settled.
    Costs are finite and a valid column is free, so each step settles one more column and the search ends.
    """
    num_columns = cost.shape[1]

    def step(state):
        current, _, length, distance, previous, reached, _ = state
        through = length + cost[current] - row_price[current] - column_price
        shorter = column_valid & ~reached & (through < distance)
        distance = jnp.where(shorter, through, distance)
        previous = jnp.where(shorter, current, previous)
        nearest = jnp.argmin(jnp.where(reached, jnp.inf, distance))
        reached = reached.at[nearest].set(True)
        return owner[nearest], owner[nearest] >= 0, distance[nearest], distance, previous, reached, nearest

    distance = jnp.full(num_columns, jnp.inf)
    previous, reached = jnp.full(num_columns, -1), jnp.zeros(num_columns, bool)
    start = (row, active, jnp.float32(0), distance, previous, reached, 0)
    _, _, length, distance, previous, reached, sink = lax.while_loop(lambda state: state[1], step, start)
    return sink, length, distance, previous, reached


def _invert(column_of: Int32[Array, " R"], num_columns: int) -> Int32[Array, " C"]:
    """The row of every column, -1 where it has none."""
    rows = jnp.arange(column_of.shape[0])
    target = jnp.where(column_of >= 0, column_of, num_columns)  # num_columns is dropped
    return jnp.full(num_columns, -1).at[target].set(rows, mode="drop")
