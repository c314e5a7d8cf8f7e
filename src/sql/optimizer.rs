//! Removes calls whose result nobody reads, and marks those below a limit.

use std::collections::HashSet;
use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::error::Result;
use datafusion::logical_expr::{Expr, Extension, LogicalPlan};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

use super::analyzer::infer_node;

/// The optimizer rule; see the module.
#[derive(Debug)]
pub struct PruneModelCalls;

impl OptimizerRule for PruneModelCalls {
    fn name(&self) -> &str {
        "prune_model_calls"
    }

    fn supports_rewrite(&self) -> bool {
        true
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let mut plan = Transformed::no(plan);
        // A call may have been another's argument, so that the first is free once the second is gone.
        loop {
            let read = columns_read(&plan.data)?;
            let pruned = plan.data.transform_up_with_subqueries(|node| match infer_node(&node) {
                Some(infer) if !read.contains(infer.output()) => Ok(Transformed::yes(infer.input().clone())),
                _ => Ok(Transformed::no(node)),
            })?;
            if !pruned.transformed {
                plan.data = pruned.data;
                break;
            }
            let schemas =
                pruned.data.transform_up_with_subqueries(|node| node.recompute_schema().map(Transformed::yes))?;
            plan = Transformed::yes(schemas.data);
        }
        let marked = mark_below_limits(plan.data, false)?;
        Ok(Transformed { transformed: plan.transformed || marked.transformed, ..marked })
    }
}

/// The names of all columns that any operator reads, or the plan gives.
fn columns_read(plan: &LogicalPlan) -> Result<HashSet<String>> {
    let mut read: HashSet<String> = names(plan);
    plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                match expr {
                    Expr::Column(column) | Expr::OuterReferenceColumn(_, column) => {
                        read.insert(column.name.clone());
                    }
                    _ => {}
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })?;
        let reads_by_name = match node {
            LogicalPlan::Projection(_)
            | LogicalPlan::Filter(_)
            | LogicalPlan::Sort(_)
            | LogicalPlan::Limit(_)
            | LogicalPlan::Window(_)
            | LogicalPlan::Aggregate(_)
            | LogicalPlan::Join(_)
            | LogicalPlan::Repartition(_)
            | LogicalPlan::SubqueryAlias(_) => true,
            other => infer_node(other).is_some(),
        };
        if !reads_by_name {
            node.inputs().into_iter().for_each(|input| read.extend(names(input)));
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(read)
}

fn names(plan: &LogicalPlan) -> HashSet<String> {
    plan.schema().fields().iter().map(|field| field.name().clone()).collect()
}

/// Calls below a limit are computed in small steps, since the limit may be met soon.
fn mark_below_limits(plan: LogicalPlan, below_limit: bool) -> Result<Transformed<LogicalPlan>> {
    let below_limit = match &plan {
        LogicalPlan::Limit(_) => true,
        // They need all of their input before they give a row.
        LogicalPlan::Sort(_) | LogicalPlan::Aggregate(_) | LogicalPlan::Window(_) => false,
        _ => below_limit,
    };
    let plan = match infer_node(&plan) {
        Some(infer) if below_limit && !infer.stops_early() => {
            Transformed::yes(LogicalPlan::Extension(Extension { node: Arc::new(infer.stopping_early()) }))
        }
        _ => Transformed::no(plan),
    };
    plan.transform_children(|plan| {
        plan.map_subqueries(|plan| mark_below_limits(plan, false))?
            .transform_sibling(|plan| plan.map_children(|child| mark_below_limits(child, below_limit)))
    })
}
