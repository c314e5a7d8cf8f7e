//! Hoists each distinct call below the operator that uses it.
//!
//! The rule goes through a plan from its leaves. At an operator whose expressions hold calls it puts an [`InferNode`] over
//! the operator's input for each distinct one and replaces the calls by the node's column. The column goes on upwards
//! through operators that keep their input's rows, so that the same call above finds it there; where it ends, a projection
//! brings back the schema that the query has. Calls that a row may not need are hoisted with their guard:
//! `CASE WHEN guard THEN ai_generate(text) END` computes `CASE WHEN guard THEN text END`, and a null costs nothing.

#![expect(clippy::mutable_key_type, reason = "a call is keyed by its names; what a model has loaded is not hashed")]

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, ScalarValue, plan_err};
use datafusion::config::ConfigOptions;
use datafusion::error::Result;
use datafusion::logical_expr::expr::{AggregateFunction, AggregateFunctionParams, Alias, ScalarFunction, Sort};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{
    Case, Distinct, DistinctOn, Expr, ExprSchemable, Extension, Filter, LogicalPlan, Projection, SubqueryAlias, lit,
};
use datafusion::optimizer::AnalyzerRule;

use super::call::ModelCall;
use super::functions::ModelFunctionMarker;
use super::node::InferNode;

/// The analyzer rule; see the module.
#[derive(Debug, Default)]
pub struct HoistModelCalls {}

impl AnalyzerRule for HoistModelCalls {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        if first_marker(&plan)?.is_none() {
            return Ok(plan);
        }
        let mut hoister = Hoister { next_number: next_number(&plan)? };
        let plan = hoister.rewrite_whole(plan)?;
        match first_marker(&plan)? {
            None => Ok(plan),
            Some((function, place)) => plan_err!(
                "{function} cannot be used in {place}; compute it in a subquery, as in \
                 FROM (SELECT *, {function}(…) AS result FROM …)"
            ),
        }
    }

    fn name(&self) -> &str {
        "hoist_model_calls"
    }
}

/// The first call that is still a marker, and what it stands in.
fn first_marker(plan: &LogicalPlan) -> Result<Option<(String, &'static str)>> {
    let mut found = None;
    plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Some((function, _)) = marker(expr) {
                    found = Some((function.name().to_owned(), place(node)));
                    return Ok(TreeNodeRecursion::Stop);
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    Ok(found)
}

fn place(node: &LogicalPlan) -> &'static str {
    match node {
        LogicalPlan::Join(_) => "JOIN … ON",
        LogicalPlan::Values(_) => "VALUES",
        LogicalPlan::Unnest(_) => "UNNEST",
        LogicalPlan::Limit(_) => "LIMIT",
        LogicalPlan::TableScan(_) => "a filter of a table",
        _ => "this place",
    }
}

fn marker(expr: &Expr) -> Option<(&ScalarFunction, &ModelFunctionMarker)> {
    match expr {
        Expr::ScalarFunction(function) => ModelFunctionMarker::of(&function.func).map(|marker| (function, marker)),
        _ => None,
    }
}

/// A number that no hoisted call of the plan has; a plan may be analyzed again as a part of another.
fn next_number(plan: &LogicalPlan) -> Result<usize> {
    let mut next = 1;
    plan.apply_with_subqueries(|node| {
        if let Some(infer) = infer_node(node) {
            let number = infer.output().rsplit('_').next().and_then(|number| number.parse::<usize>().ok());
            next = next.max(number.unwrap_or(0) + 1);
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(next)
}

/// The node of a hoisted call, if the plan's first operator is one.
pub(super) fn infer_node(plan: &LogicalPlan) -> Option<&InferNode> {
    match plan {
        LogicalPlan::Extension(Extension { node }) => node.as_any().downcast_ref(),
        _ => None,
    }
}

/// Calls whose results are columns: what is called with which argument, and the column.
type Available = HashMap<(Arc<ModelCall>, Expr), Column>;

struct Hoister {
    next_number: usize,
}

/// An operator's input with what was hoisted over it.
struct Input {
    plan: LogicalPlan,
    available: Available,
}

/// Why an expression may not be evaluated: the branch of a CASE that it stands in.
#[derive(Debug, Clone)]
struct Branch {
    base: Option<Box<Expr>>,
    /// Conditions that must not hold.
    before: Vec<Expr>,
    /// The condition that must hold; none for ELSE.
    condition: Option<Expr>,
}

impl Branch {
    /// `argument` where the branch is taken, else `null`.
    fn guard(&self, argument: Expr, null: &ScalarValue) -> Expr {
        let null = || Box::new(lit(null.clone()));
        let mut when_then_expr: Vec<_> =
            self.before.iter().map(|condition| (Box::new(condition.clone()), null())).collect();
        let else_expr = match &self.condition {
            Some(condition) => {
                when_then_expr.push((Box::new(condition.clone()), Box::new(argument)));
                None
            }
            None => Some(Box::new(argument)),
        };
        Expr::Case(Case { expr: self.base.clone(), when_then_expr, else_expr })
    }
}

impl Hoister {
    /// The plan without markers, with the schema it had.
    fn rewrite_whole(&mut self, plan: LogicalPlan) -> Result<LogicalPlan> {
        let columns: Vec<Expr> = plan.schema().columns().into_iter().map(Expr::Column).collect();
        let input = self.rewrite(plan)?;
        if input.plan.schema().fields().len() == columns.len() {
            return Ok(input.plan);
        }
        Ok(LogicalPlan::Projection(Projection::try_new(columns, Arc::new(input.plan))?))
    }

    /// The plan without markers, which may have columns of calls besides its own.
    fn rewrite(&mut self, plan: LogicalPlan) -> Result<Input> {
        let plan = plan.map_subqueries(|plan| self.rewrite_whole(plan).map(Transformed::yes))?.data;
        match plan {
            LogicalPlan::Filter(_) | LogicalPlan::Sort(_) | LogicalPlan::Window(_) => {
                let (plan, input) = self.rewrite_over_input(plan)?;
                Ok(Input { plan, available: input })
            }
            LogicalPlan::Limit(_) if first_expression_marker(&plan)?.is_none() => {
                let (plan, input) = self.rewrite_over_input(plan)?;
                Ok(Input { plan, available: input })
            }
            LogicalPlan::Projection(_) => self.rewrite_projection(plan),
            LogicalPlan::Distinct(Distinct::On(distinct)) => self.rewrite_distinct_on(distinct),
            LogicalPlan::Aggregate(_) | LogicalPlan::Repartition(_) => {
                let (plan, _) = self.rewrite_over_input(plan)?;
                Ok(Input { plan, available: Available::new() })
            }
            LogicalPlan::SubqueryAlias(SubqueryAlias { input, alias, .. }) => {
                let input = self.rewrite(Arc::unwrap_or_clone(input))?;
                let renamed = |column: &Column| Column::new(Some(alias.clone()), &column.name);
                let available = input.available.into_iter().map(|((call, argument), column)| {
                    let argument = argument.transform(|expr| match &expr {
                        Expr::Column(column) => Ok(Transformed::yes(Expr::Column(renamed(column)))),
                        _ => Ok(Transformed::no(expr)),
                    })?;
                    Ok(((call, argument.data), renamed(&column)))
                });
                let available = available.collect::<Result<_>>()?;
                let plan = SubqueryAlias::try_new(Arc::new(input.plan), alias)?;
                Ok(Input { plan: LogicalPlan::SubqueryAlias(plan), available })
            }
            other => {
                let plan = other.map_children(|child| self.rewrite_whole(child).map(Transformed::yes))?.data;
                Ok(Input { plan, available: Available::new() })
            }
        }
    }

    /// Rewrites an operator with one input, and hoists its calls over that.
    fn rewrite_over_input(&mut self, plan: LogicalPlan) -> Result<(LogicalPlan, Available)> {
        let Some(input) = plan.inputs().first().map(|input| (*input).clone()) else {
            return Ok((plan, Available::new()));
        };
        let mut input = self.rewrite(input)?;
        let names = NamePreserver::new(&plan);
        let exprs = plan.expressions();
        let saved: Vec<_> = exprs.iter().map(|expr| names.save(expr)).collect();
        let exprs = self.rewrite_expressions(exprs, &mut input)?;
        let exprs = exprs.into_iter().zip(saved).map(|(expr, name)| name.restore(expr)).collect();
        Ok((plan.with_new_exprs(exprs, vec![input.plan])?, input.available))
    }

    /// DISTINCT ON, whose parts cannot be replaced as those of other operators.
    fn rewrite_distinct_on(&mut self, distinct: DistinctOn) -> Result<Input> {
        let DistinctOn { on_expr, select_expr, sort_expr, input, .. } = distinct;
        let mut input = self.rewrite(Arc::unwrap_or_clone(input))?;
        let names = NamePreserver::new_for_projection();
        let saved: Vec<_> = select_expr.iter().map(|expr| names.save(expr)).collect();
        let on_expr = self.rewrite_expressions(on_expr, &mut input)?;
        let select_expr = self.rewrite_expressions(select_expr, &mut input)?;
        let select_expr = select_expr.into_iter().zip(saved).map(|(expr, name)| name.restore(expr)).collect();
        let sort_expr = match sort_expr {
            Some(sorts) => {
                let exprs =
                    self.rewrite_expressions(sorts.iter().map(|sort| sort.expr.clone()).collect(), &mut input)?;
                Some(sorts.into_iter().zip(exprs).map(|(sort, expr)| Sort { expr, ..sort }).collect())
            }
            None => None,
        };
        let distinct = DistinctOn::try_new(on_expr, select_expr, sort_expr, Arc::new(input.plan))?;
        Ok(Input { plan: LogicalPlan::Distinct(Distinct::On(distinct)), available: Available::new() })
    }

    /// Calls over columns that a projection keeps are kept with them.
    fn rewrite_projection(&mut self, plan: LogicalPlan) -> Result<Input> {
        let (plan, available) = self.rewrite_over_input(plan)?;
        let LogicalPlan::Projection(Projection { mut expr, input, .. }) = plan else {
            return Ok(Input { plan, available });
        };
        let mut kept: HashMap<Column, Column> = HashMap::new();
        for expr in &expr {
            let (relation, name) = expr.qualified_name();
            let from = match expr {
                Expr::Column(column) => Some(column),
                Expr::Alias(Alias { expr, .. }) => expr.try_as_col(),
                _ => None,
            };
            if let Some(from) = from {
                kept.insert(from.clone(), Column::new(relation, name));
            }
        }
        let mut still_available = Available::new();
        let mut ordered: Vec<_> = available.into_iter().collect();
        ordered.sort_by(|(_, a), (_, b)| a.cmp(b));
        for ((call, argument), column) in ordered {
            let columns = argument.column_refs();
            if columns.is_empty() || !columns.iter().all(|column| kept.contains_key(*column)) {
                continue;
            }
            let argument = argument.transform(|expr| match &expr {
                Expr::Column(column) => Ok(Transformed::yes(Expr::Column(kept[column].clone()))),
                _ => Ok(Transformed::no(expr)),
            })?;
            // The column may be there as it stands already; under another name it is added.
            if kept.get(&column) != Some(&column) {
                expr.push(Expr::Column(column.clone()));
            }
            still_available.insert((call, argument.data), column);
        }
        let plan = LogicalPlan::Projection(Projection::try_new(expr, input)?);
        Ok(Input { plan, available: still_available })
    }

    /// Replaces the calls of one operator's expressions by columns of `input`.
    fn rewrite_expressions(&mut self, exprs: Vec<Expr>, input: &mut Input) -> Result<Vec<Expr>> {
        // What is always evaluated goes first, so that the same call under a guard finds it.
        let mut rewritten = Vec::with_capacity(exprs.len());
        for expr in exprs {
            rewritten.push(self.rewrite_expression(expr, input, None)?);
        }
        rewritten.into_iter().map(|expr| self.rewrite_expression(expr, input, Some(&mut Vec::new()))).collect()
    }

    /// Replaces the calls of an expression; those under a guard only where `branches` says which it is in.
    fn rewrite_expression(
        &mut self,
        expr: Expr,
        input: &mut Input,
        mut branches: Option<&mut Vec<Branch>>,
    ) -> Result<Expr> {
        if !contains_marker(&expr)? {
            return Ok(expr);
        }
        match expr {
            Expr::Case(Case { expr: base, when_then_expr, else_expr }) => {
                let base = match base {
                    Some(base) => Some(Box::new(self.rewrite_expression(*base, input, branches.as_deref_mut())?)),
                    None => None,
                };
                let mut before = Vec::new();
                let mut new_when_then = Vec::with_capacity(when_then_expr.len());
                for (condition, result) in when_then_expr {
                    // The first condition is always evaluated, the next one where none before it holds.
                    let condition = if before.is_empty() {
                        self.rewrite_expression(*condition, input, branches.as_deref_mut())?
                    } else {
                        let branch = Branch { base: base.clone(), before: before.clone(), condition: None };
                        self.rewrite_guarded(*condition, input, branches.as_deref_mut(), branch)?
                    };
                    let branch =
                        Branch { base: base.clone(), before: before.clone(), condition: Some(condition.clone()) };
                    let result = self.rewrite_guarded(*result, input, branches.as_deref_mut(), branch)?;
                    before.push(condition.clone());
                    new_when_then.push((Box::new(condition), Box::new(result)));
                }
                let else_expr = match else_expr {
                    Some(result) => {
                        let branch = Branch { base: base.clone(), before, condition: None };
                        Some(Box::new(self.rewrite_guarded(*result, input, branches, branch)?))
                    }
                    None => None,
                };
                Ok(Expr::Case(Case { expr: base, when_then_expr: new_when_then, else_expr }))
            }
            Expr::ScalarFunction(ScalarFunction { func, args }) if func.name() == "coalesce" => {
                let mut before: Vec<Expr> = Vec::new();
                for argument in args {
                    let argument = match before.is_empty() {
                        true => self.rewrite_expression(argument, input, branches.as_deref_mut())?,
                        false => {
                            let filled = before.iter().map(|argument| argument.clone().is_not_null()).collect();
                            let branch = Branch { base: None, before: filled, condition: None };
                            self.rewrite_guarded(argument, input, branches.as_deref_mut(), branch)?
                        }
                    };
                    before.push(argument);
                }
                Ok(Expr::ScalarFunction(ScalarFunction { func, args: before }))
            }
            Expr::AggregateFunction(AggregateFunction {
                func,
                params: AggregateFunctionParams { args, distinct, filter: Some(filter), order_by, null_treatment },
            }) => {
                let filter = self.rewrite_expression(*filter, input, branches.as_deref_mut())?;
                let branch = Branch { base: None, before: Vec::new(), condition: Some(filter.clone()) };
                let args = args
                    .into_iter()
                    .map(|argument| self.rewrite_guarded(argument, input, branches.as_deref_mut(), branch.clone()));
                let args = args.collect::<Result<_>>()?;
                let filter = Some(Box::new(filter));
                let order_by = order_by
                    .into_iter()
                    .map(|mut sort| {
                        sort.expr = self.rewrite_expression(sort.expr, input, branches.as_deref_mut())?;
                        Ok(sort)
                    })
                    .collect::<Result<_>>()?;
                let params = AggregateFunctionParams { args, distinct, filter, order_by, null_treatment };
                Ok(Expr::AggregateFunction(AggregateFunction { func, params }))
            }
            other => {
                let rewritten = other.map_children(|child| {
                    self.rewrite_expression(child, input, branches.as_deref_mut()).map(Transformed::yes)
                })?;
                self.replace(rewritten.data, input, branches)
            }
        }
    }

    /// As [`Hoister::rewrite_expression`] for an expression that is evaluated in `branch` only.
    fn rewrite_guarded(
        &mut self,
        expr: Expr,
        input: &mut Input,
        branches: Option<&mut Vec<Branch>>,
        branch: Branch,
    ) -> Result<Expr> {
        let Some(branches) = branches else { return Ok(expr) };
        branches.push(branch);
        let rewritten = self.rewrite_expression(expr, input, Some(branches));
        branches.pop();
        rewritten
    }

    /// Replaces a call, whose arguments hold no calls any more, by its column.
    fn replace(&mut self, expr: Expr, input: &mut Input, branches: Option<&mut Vec<Branch>>) -> Result<Expr> {
        let Some((function, marker)) = marker(&expr) else { return Ok(expr) };
        let name = function.name();
        let Some(argument) = function.args.first() else { return plan_err!("{name} needs an argument") };
        if contains_marker(argument)? {
            // A nested call stands under a guard, and comes by again with it.
            return Ok(expr);
        }
        if argument.contains_outer() {
            return plan_err!(
                "{name} cannot be used on a column of the outer query in a subquery; compute it in the outer query"
            );
        }
        let call = Arc::new(marker.call(&function.args)?);
        let unguarded = unaliased(argument.clone());
        if let Some(column) = input.available.get(&(call.clone(), unguarded.clone())) {
            return Ok(Expr::Column(column.clone()));
        }
        // Types are settled by now: the null has to be of the argument's.
        let null = match unguarded.get_type(input.plan.schema())? {
            DataType::Null => ScalarValue::Utf8(None),
            data_type => ScalarValue::try_from(&data_type)?,
        };
        let guarded = branches
            .map_or(&[][..], |branches| &branches[..])
            .iter()
            .rfold(unguarded, |argument, branch| branch.guard(argument, &null));
        if let Some(column) = input.available.get(&(call.clone(), guarded.clone())) {
            return Ok(Expr::Column(column.clone()));
        }
        self.hoist(call, guarded, input).map(Expr::Column)
    }

    /// Puts the node of a call over `input`.
    fn hoist(&mut self, call: Arc<ModelCall>, argument: Expr, input: &mut Input) -> Result<Column> {
        let number = self.next_number;
        self.next_number += 1;
        let mut plan = std::mem::take(&mut input.plan);
        // Below a condition on the outer query's columns, which the optimizer makes a join of all rows.
        let mut outer_conditions = Vec::new();
        while let LogicalPlan::Filter(filter) = &plan
            && filter.predicate.contains_outer()
        {
            outer_conditions.push(filter.predicate.clone());
            plan = filter.input.as_ref().clone();
        }
        // DataFusion computes arguments: they may hold whatever it can plan, subqueries among them.
        let column = match &argument {
            Expr::Column(column) => column.clone(),
            _ => {
                let mut exprs: Vec<Expr> = plan.schema().columns().into_iter().map(Expr::Column).collect();
                let name = format!("__argument_{number}");
                exprs.push(argument.clone().alias(&name));
                plan = LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(plan))?);
                Column::new_unqualified(name)
            }
        };
        let output = format!("__{}_{number}", call.function.name());
        let node = InferNode::try_new(plan, call.clone(), Expr::Column(column), output.clone(), false)?;
        let mut plan = LogicalPlan::Extension(Extension { node: Arc::new(node) });
        while let Some(condition) = outer_conditions.pop() {
            plan = LogicalPlan::Filter(Filter::try_new(condition, Arc::new(plan))?);
        }
        input.plan = plan;
        let output = Column::new_unqualified(output);
        input.available.insert((call, argument), output.clone());
        Ok(output)
    }
}

fn contains_marker(expr: &Expr) -> Result<bool> {
    expr.exists(|expr| Ok(marker(expr).is_some()))
}

fn first_expression_marker(plan: &LogicalPlan) -> Result<Option<()>> {
    for expr in plan.expressions() {
        if contains_marker(&expr)? {
            return Ok(Some(()));
        }
    }
    Ok(None)
}

fn unaliased(expr: Expr) -> Expr {
    match expr {
        Expr::Alias(Alias { expr, .. }) => unaliased(*expr),
        other => other,
    }
}
