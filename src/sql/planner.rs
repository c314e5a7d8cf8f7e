//! Plans hoisted calls, and leaves everything else to the session's own planner.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::plan_err;
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::datasource::provider_as_source;
use datafusion::error::Result;
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{
    Expr, LogicalPlan, TableScan, TableType, UserDefinedLogicalNode, UserDefinedLogicalNodeCore,
};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};

use super::analyzer::infer_node;
use super::exec::InferExec;
use super::node::InferNode;

/// A planner that knows [`InferNode`] around one that does not.
#[derive(Debug)]
pub struct InferQueryPlanner {
    inner: Arc<dyn QueryPlanner + Send + Sync>,
}

impl InferQueryPlanner {
    /// Wraps a session's planner.
    pub fn around(inner: Arc<dyn QueryPlanner + Send + Sync>) -> Self {
        Self { inner }
    }

    /// Whether the planner is the one of every session, which takes extensions.
    fn wraps_default(&self) -> bool {
        let default = SessionStateBuilder::new().build();
        let type_of = |planner: &Arc<dyn QueryPlanner + Send + Sync>| std::any::Any::type_id(&**planner);
        type_of(&self.inner) == type_of(default.query_planner())
    }
}

#[async_trait]
impl QueryPlanner for InferQueryPlanner {
    async fn create_physical_plan(
        &self,
        logical_plan: &LogicalPlan,
        session: &dyn Session,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if self.wraps_default() {
            let planner = DefaultPhysicalPlanner::with_extension_planners(vec![Arc::new(InferPlanner)]);
            return planner.create_physical_plan(logical_plan, session).await;
        }
        // Another planner does not know the nodes: each is planned by itself, from the leaves, and put in as a table.
        let mut plan = logical_plan.clone();
        while let Some(infer) = lowest_infer(&plan)? {
            let input = self.inner.create_physical_plan(infer.input(), session).await?;
            let argument = session.create_physical_expr(infer.argument().clone(), infer.input().schema())?;
            let planned: Arc<dyn ExecutionPlan> = Arc::new(InferExec::try_new(input, &infer, argument)?);
            let scan = planned_scan(&infer, planned);
            plan = plan
                .transform_down_with_subqueries(|node| match infer_node(&node) {
                    Some(found) if found == &infer => Ok(Transformed::yes(scan.clone())),
                    _ => Ok(Transformed::no(node)),
                })?
                .data;
        }
        self.inner.create_physical_plan(&plan, session).await
    }
}

/// Plans [`InferNode`] for DataFusion's own planner.
struct InferPlanner;

#[async_trait]
impl ExtensionPlanner for InferPlanner {
    async fn plan_extension(
        &self,
        planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        logical_inputs: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        session: &dyn Session,
        planning_context: &PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(infer) = node.as_any().downcast_ref::<InferNode>() else { return Ok(None) };
        let ([logical_input], [physical_input]) = (logical_inputs, physical_inputs) else {
            return plan_err!("Infer has one input");
        };
        let argument =
            planner.create_physical_expr(infer.argument(), logical_input.schema(), session, planning_context)?;
        Ok(Some(Arc::new(InferExec::try_new(physical_input.clone(), infer, argument)?)))
    }
}

/// A node that has no other below it.
fn lowest_infer(plan: &LogicalPlan) -> Result<Option<InferNode>> {
    let mut lowest = None;
    plan.apply_with_subqueries(|node| {
        if let Some(infer) = infer_node(node) {
            lowest = Some(infer.clone());
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(lowest)
}

/// A scan of a node that is planned already.
fn planned_scan(infer: &InferNode, plan: Arc<dyn ExecutionPlan>) -> LogicalPlan {
    LogicalPlan::TableScan(TableScan {
        table_name: infer.output().into(),
        source: provider_as_source(Arc::new(PlannedTable { plan })),
        projection: None,
        projected_schema: UserDefinedLogicalNodeCore::schema(infer).clone(),
        filters: Vec::new(),
        fetch: None,
        statistics_requests: Default::default(),
    })
}

/// A table whose scan is a plan that is there already.
struct PlannedTable {
    plan: Arc<dyn ExecutionPlan>,
}

impl fmt::Debug for PlannedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlannedTable").field("plan", &self.plan.name()).finish()
    }
}

#[async_trait]
impl TableProvider for PlannedTable {
    fn schema(&self) -> arrow::datatypes::SchemaRef {
        self.plan.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Temporary
    }

    async fn scan(
        &self,
        _: &dyn Session,
        projection: Option<&Vec<usize>>,
        _: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        match projection {
            None => Ok(self.plan.clone()),
            Some(_) => plan_err!("a planned node is read whole"),
        }
    }
}
