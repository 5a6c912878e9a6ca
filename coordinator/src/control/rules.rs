//! The rules by which commands change the control state: a pure function of state and command.

use std::collections::BTreeSet;

use super::OPERATOR;
use super::command::{AdmitRequest, Command, Outcome, Rejection, Subject};
use super::state::{
    ApiKey, Cluster, ControlState, Deployment, Group, GroupState, JoinTokenRecord, Node,
    RankAssignment, ShardReport, StoreGroup, Tenant,
};
use crate::ids::{Device, Epoch, GroupId, NodeId, RaftGroupId, Rank, Role, TenantId};

/// Longest name of a tenant, key, model or node, in bytes: they stand in labels, tables and logs.
const MAX_NAME_BYTES: usize = 200;
/// Longest path or failure reason kept in the state, in bytes; the state travels whole to every node.
const MAX_TEXT_BYTES: usize = 4096;
/// Devices of one node: two eight-GPU boards.
const MAX_DEVICES: usize = 16;
/// Bounds on what the state holds, so that it stays far below one transport frame.
const MAX_NODES: usize = 1_000;
const MAX_TENANTS: usize = 5_000;
const MAX_API_KEYS: usize = 20_000;
const MAX_JOIN_TOKENS: usize = 1_000;
const MAX_DEPLOYMENTS: usize = 200;

impl ControlState {
    /// Applies `command` or rejects it; a rejection leaves the state untouched. Deterministic: time comes with the command.
    ///
    /// # Errors
    /// The [`Rejection`] that says what was expected and what came.
    pub fn apply(&mut self, command: Command) -> Result<Outcome, Rejection> {
        let outcome = self.change(command)?;
        self.revision += 1;
        Ok(outcome.unwrap_or(Outcome::Done {
            revision: self.revision,
        }))
    }

    /// `Ok(None)` stands for [`Outcome::Done`]. Checks everything before it changes anything.
    fn change(&mut self, command: Command) -> Result<Option<Outcome>, Rejection> {
        match command {
            Command::NameCluster(cluster) => self.name_cluster(cluster),
            Command::RegisterNode(node) => self.register_node(node),
            Command::AdmitNode(request) => self.admit_node(request),
            Command::SetNodeUp {
                node,
                incarnation,
                up,
            } => self.set_node_up(node, incarnation, up),
            Command::RemoveNode { node } => self.remove_node(node),
            Command::CreateJoinToken {
                secret_sha256,
                record,
            } => self.create_join_token(secret_sha256, record),
            Command::ExpireJoinTokens { now_ms } => {
                self.join_tokens.retain(|_, t| t.expires_ms >= now_ms);
                Ok(None)
            }
            Command::CreateTenant { id, name, now_ms } => self.create_tenant(id, name, now_ms),
            Command::RemoveTenant { id } => self.remove_tenant(&id),
            Command::CreateApiKey { sha256, key } => self.create_api_key(sha256, key),
            Command::RevokeApiKey { tenant, id } => self.revoke_api_key(&tenant, &id),
            Command::SetDeployment(deployment) => self.set_deployment(deployment),
            Command::RemoveDeployment { model } => self.remove_deployment(&model),
            Command::FormGroup {
                model,
                expect,
                ranks,
                key,
            } => self.form_group(&model, expect, ranks, key),
            Command::RankReady {
                group,
                epoch,
                rank,
                report,
            } => self.rank_ready(group, epoch, rank, report),
            Command::RankFailed {
                group,
                epoch,
                rank,
                reason,
            } => self.rank_failed(group, epoch, rank, reason),
            Command::CreateStoreGroup(group) => self.create_store_group(group),
        }
    }

    fn name_cluster(&mut self, cluster: Cluster) -> Result<Option<Outcome>, Rejection> {
        if !self.cluster.id.is_empty() {
            return Err(exists(Subject::Cluster, &self.cluster.name));
        }
        check_name(Subject::Cluster, &cluster.name)?;
        check_name(Subject::Cluster, &cluster.id)?;
        self.cluster = cluster;
        Ok(None)
    }

    fn register_node(&mut self, mut node: Node) -> Result<Option<Outcome>, Rejection> {
        check_name(Subject::Node, &node.name)?;
        check_equipment(&node.devices, &node.version)?;
        if self.revoked.contains(&node.id) {
            return Err(Rejection::Revoked { node: node.id });
        }
        if node.id.0 == 0 || node.id == OPERATOR || node.roles.is_empty() {
            return Err(invalid(
                "node",
                "a node id above 0 and at least one role",
                &format!("{:?}", node.id),
            ));
        }
        match self.nodes.get(&node.id) {
            // A coordinator holds the CA's key, so its roles are its own to choose; others keep to those that they were
            // admitted with.
            Some(admitted)
                if !admitted.roles.contains(&Role::Coordinator)
                    && !node.roles.is_subset(&admitted.roles) =>
            {
                return Err(invalid(
                    "roles",
                    &format!(
                        "some of those that the node was admitted with: {}",
                        list(&admitted.roles)
                    ),
                    &list(&node.roles),
                ));
            }
            None if self.nodes.len() >= MAX_NODES => {
                return Err(Rejection::Limit {
                    what: Subject::Node,
                    limit: MAX_NODES,
                });
            }
            _ => {}
        }
        node.up = true;
        self.last_node = self.last_node.max(node.id.0);
        self.nodes.insert(node.id, node);
        Ok(None)
    }

    fn admit_node(&mut self, request: AdmitRequest) -> Result<Option<Outcome>, Rejection> {
        check_name(Subject::Node, &request.name)?;
        check_equipment(&request.devices, &request.version)?;
        let token = self
            .join_tokens
            .get(&request.secret_sha256)
            .ok_or(Rejection::TokenUnknown)?;
        if token.expires_ms < request.now_ms {
            return Err(Rejection::TokenExpired);
        }
        if let Some(role) = request.roles.iter().find(|r| !token.roles.contains(r)) {
            return Err(Rejection::RoleNotAllowed {
                role: *role,
                allowed: list(&token.roles),
            });
        }
        if request.roles.is_empty() {
            return Err(invalid("roles", "at least one role", "none"));
        }
        if self.nodes.len() >= MAX_NODES {
            return Err(Rejection::Limit {
                what: Subject::Node,
                limit: MAX_NODES,
            });
        }
        self.join_tokens.remove(&request.secret_sha256);
        self.last_node += 1;
        let id = NodeId(self.last_node);
        // Not up until it registers with the certificate that it gets now.
        let node = Node {
            id,
            name: request.name,
            addr: request.addr,
            data_addr: request.data_addr,
            roles: request.roles,
            devices: request.devices,
            up: false,
            version: request.version,
            incarnation: 0,
        };
        self.nodes.insert(id, node);
        Ok(Some(Outcome::Admitted { node: id }))
    }

    fn set_node_up(
        &mut self,
        id: NodeId,
        incarnation: u64,
        up: bool,
    ) -> Result<Option<Outcome>, Rejection> {
        let node = self
            .nodes
            .get_mut(&id)
            .ok_or_else(|| unknown(Subject::Node, id.0))?;
        // A verdict on an earlier process says nothing about the one that has registered since.
        if node.incarnation != incarnation {
            return Err(invalid(
                "incarnation",
                &node.incarnation.to_string(),
                &incarnation.to_string(),
            ));
        }
        node.up = up;
        Ok(None)
    }

    fn remove_node(&mut self, node: NodeId) -> Result<Option<Outcome>, Rejection> {
        self.nodes
            .remove(&node)
            .ok_or_else(|| unknown(Subject::Node, node.0))?;
        self.revoked.insert(node);
        Ok(None)
    }

    fn create_join_token(
        &mut self,
        sha: [u8; 32],
        record: JoinTokenRecord,
    ) -> Result<Option<Outcome>, Rejection> {
        if self.join_tokens.contains_key(&sha) {
            return Err(exists(Subject::JoinToken, &hex::encode(&sha[..6])));
        }
        if record.roles.is_empty() {
            return Err(invalid("roles", "at least one role", "none"));
        }
        if self.join_tokens.len() >= MAX_JOIN_TOKENS {
            return Err(Rejection::Limit {
                what: Subject::JoinToken,
                limit: MAX_JOIN_TOKENS,
            });
        }
        self.join_tokens.insert(sha, record);
        Ok(None)
    }

    fn create_tenant(
        &mut self,
        id: TenantId,
        name: String,
        now_ms: u64,
    ) -> Result<Option<Outcome>, Rejection> {
        check_name(Subject::Tenant, &name)?;
        if self.tenants.contains_key(&id) {
            return Err(exists(Subject::Tenant, id.as_str()));
        }
        if self.tenants.len() >= MAX_TENANTS {
            return Err(Rejection::Limit {
                what: Subject::Tenant,
                limit: MAX_TENANTS,
            });
        }
        // The least used store group; the first one will be number 1, also when it does not exist yet.
        let store_group = self
            .store_groups
            .iter()
            .map(|g| {
                (
                    self.tenants
                        .values()
                        .filter(|t| t.store_group == g.id)
                        .count(),
                    g.id,
                )
            })
            .min()
            .map_or(RaftGroupId(1), |(_, id)| id);
        self.tenants.insert(
            id.clone(),
            Tenant {
                id,
                name,
                store_group,
                created_ms: now_ms,
            },
        );
        Ok(None)
    }

    fn remove_tenant(&mut self, id: &TenantId) -> Result<Option<Outcome>, Rejection> {
        self.tenants
            .remove(id)
            .ok_or_else(|| unknown(Subject::Tenant, id))?;
        self.api_keys.retain(|_, k| k.tenant != *id);
        Ok(None)
    }

    fn create_api_key(&mut self, sha: [u8; 32], key: ApiKey) -> Result<Option<Outcome>, Rejection> {
        check_name(Subject::ApiKey, &key.name)?;
        check_name(Subject::ApiKey, &key.id)?;
        if !self.tenants.contains_key(&key.tenant) {
            return Err(unknown(Subject::Tenant, &key.tenant));
        }
        if self.api_keys.contains_key(&sha) || self.api_keys.values().any(|k| k.id == key.id) {
            return Err(exists(Subject::ApiKey, &key.id));
        }
        if self.api_keys.len() >= MAX_API_KEYS {
            return Err(Rejection::Limit {
                what: Subject::ApiKey,
                limit: MAX_API_KEYS,
            });
        }
        self.api_keys.insert(sha, key);
        Ok(None)
    }

    fn revoke_api_key(
        &mut self,
        tenant: &TenantId,
        id: &str,
    ) -> Result<Option<Outcome>, Rejection> {
        // Another tenant's key answers as one that does not exist.
        let sha = self
            .api_keys
            .iter()
            .find(|(_, k)| k.id == id && k.tenant == *tenant)
            .map(|(sha, _)| *sha);
        self.api_keys
            .remove(&sha.ok_or_else(|| unknown(Subject::ApiKey, id))?);
        Ok(None)
    }

    fn set_deployment(&mut self, deployment: Deployment) -> Result<Option<Outcome>, Rejection> {
        check_name(Subject::Model, &deployment.model)?;
        if deployment.path.is_empty() || deployment.path.len() > MAX_TEXT_BYTES {
            return Err(invalid(
                "path",
                "a path of 1 to 4096 bytes",
                &format!("{} bytes", deployment.path.len()),
            ));
        }
        if deployment.ranks == 0 || deployment.ranks as usize > MAX_NODES {
            return Err(invalid("ranks", "1 to 1000", &deployment.ranks.to_string()));
        }
        if !self.deployments.contains_key(&deployment.model)
            && self.deployments.len() >= MAX_DEPLOYMENTS
        {
            return Err(Rejection::Limit {
                what: Subject::Model,
                limit: MAX_DEPLOYMENTS,
            });
        }
        self.deployments
            .insert(deployment.model.clone(), deployment);
        Ok(None)
    }

    fn remove_deployment(&mut self, model: &str) -> Result<Option<Outcome>, Rejection> {
        self.deployments
            .remove(model)
            .ok_or_else(|| unknown(Subject::Model, model))?;
        self.groups.retain(|_, g| g.model != model);
        Ok(None)
    }

    fn form_group(
        &mut self,
        model: &str,
        expect: Epoch,
        ranks: Vec<RankAssignment>,
        key: [u8; 32],
    ) -> Result<Option<Outcome>, Rejection> {
        let deployment = self
            .deployments
            .get(model)
            .ok_or_else(|| unknown(Subject::Model, model))?;
        let current = self.groups.values().find(|g| g.model == model);
        let expected = current.map_or(Epoch(0), |g| g.epoch);
        if expect != expected {
            return Err(Rejection::StaleEpoch {
                expected,
                got: expect,
            });
        }
        if ranks.is_empty() {
            return Err(invalid("ranks", "at least one", "none"));
        }
        let mut hosts = BTreeSet::new();
        for (at, rank) in ranks.iter().enumerate() {
            if !self.nodes.contains_key(&rank.node) {
                return Err(unknown(Subject::Node, rank.node.0));
            }
            if rank.rank.0 as usize != at || rank.report.is_some() || !hosts.insert(rank.node) {
                return Err(invalid(
                    "ranks",
                    "consecutive ranks, each on a node of its own",
                    &format!("rank {}", rank.rank.0),
                ));
            }
        }
        let id = match current {
            Some(group) => group.id,
            None => {
                self.last_group += 1;
                GroupId(self.last_group)
            }
        };
        let last_failure = current.and_then(|g| g.last_failure.clone());
        self.last_epoch += 1;
        let epoch = Epoch(self.last_epoch);
        let group = Group {
            id,
            model: deployment.model.clone(),
            kind: deployment.kind,
            path: deployment.path.clone(),
            context_tokens: deployment.context_tokens,
            epoch,
            ranks,
            state: GroupState::Forming,
            key,
            last_failure,
        };
        self.groups.insert(id, group);
        Ok(Some(Outcome::Formed { group: id, epoch }))
    }

    fn rank_ready(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        rank: Rank,
        report: ShardReport,
    ) -> Result<Option<Outcome>, Rejection> {
        let group = self.group_in_epoch(group, epoch)?;
        let slot = group
            .ranks
            .get_mut(rank.0 as usize)
            .ok_or_else(|| unknown(Subject::Rank, rank.0))?;
        slot.report = Some(report);
        if group.state == GroupState::Forming && group.ranks.iter().all(|r| r.report.is_some()) {
            group.state = GroupState::Ready;
            group.last_failure = None;
        }
        Ok(None)
    }

    fn rank_failed(
        &mut self,
        group: GroupId,
        epoch: Epoch,
        rank: Rank,
        mut reason: String,
    ) -> Result<Option<Outcome>, Rejection> {
        let group = self.group_in_epoch(group, epoch)?;
        if rank.0 as usize >= group.ranks.len() {
            return Err(unknown(Subject::Rank, rank.0));
        }
        truncate(&mut reason, MAX_TEXT_BYTES);
        // The first reason is the cause; what other ranks report after it is its consequence.
        if !matches!(group.state, GroupState::Failed { .. }) {
            group.last_failure = Some(reason.clone());
            group.state = GroupState::Failed { reason };
        }
        Ok(None)
    }

    fn group_in_epoch(&mut self, id: GroupId, epoch: Epoch) -> Result<&mut Group, Rejection> {
        let group = self
            .groups
            .get_mut(&id)
            .ok_or_else(|| unknown(Subject::Group, id.0))?;
        if group.epoch != epoch {
            return Err(Rejection::StaleEpoch {
                expected: group.epoch,
                got: epoch,
            });
        }
        Ok(group)
    }

    fn create_store_group(&mut self, group: StoreGroup) -> Result<Option<Outcome>, Rejection> {
        if group.id.0 == 0 || self.store_groups.iter().any(|g| g.id == group.id) {
            return Err(exists(Subject::StoreGroup, &group.id.0.to_string()));
        }
        self.check_store_members(&group.members)?;
        self.store_groups.push(group);
        Ok(None)
    }

    fn check_store_members(&self, members: &[NodeId]) -> Result<(), Rejection> {
        let distinct: BTreeSet<_> = members.iter().collect();
        if members.is_empty() || distinct.len() != members.len() {
            return Err(invalid(
                "members",
                "at least one node, none twice",
                &format!("{members:?}"),
            ));
        }
        for id in members {
            if !self
                .nodes
                .get(id)
                .is_some_and(|n| n.roles.contains(&Role::Store))
            {
                return Err(unknown(Subject::Node, id.0));
            }
        }
        Ok(())
    }
}

fn unknown(what: Subject, id: impl ToString) -> Rejection {
    Rejection::Unknown {
        what,
        id: id.to_string(),
    }
}

fn exists(what: Subject, id: &str) -> Rejection {
    Rejection::Exists {
        what,
        id: id.to_owned(),
    }
}

fn invalid(what: &str, expected: &str, got: &str) -> Rejection {
    Rejection::Invalid {
        what: what.to_owned(),
        expected: expected.to_owned(),
        got: got.to_owned(),
    }
}

fn check_name(what: Subject, name: &str) -> Result<(), Rejection> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        let got = format!("{} bytes", name.len());
        return Err(invalid(
            &format!("name of the {what}"),
            "1 to 200 bytes without control characters",
            &got,
        ));
    }
    Ok(())
}

/// Devices and version of a node; its name is checked apart.
fn check_equipment(devices: &[Device], version: &str) -> Result<(), Rejection> {
    if devices.len() > MAX_DEVICES {
        return Err(invalid(
            "devices of the node",
            &format!("at most {MAX_DEVICES}"),
            &devices.len().to_string(),
        ));
    }
    for (what, text) in devices
        .iter()
        .map(|d| ("name of a device", &*d.name))
        .chain([("version", version)])
    {
        if text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control) {
            return Err(invalid(
                what,
                "at most 200 bytes without control characters",
                &format!("{} bytes", text.len()),
            ));
        }
    }
    Ok(())
}

fn list(roles: &BTreeSet<Role>) -> String {
    let names: Vec<_> = roles.iter().map(Role::to_string).collect();
    names.join(", ")
}

/// Cuts at the last character boundary at or before `max` bytes.
fn truncate(text: &mut String, max: usize) {
    if text.len() > max {
        let end = (0..=max)
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        text.truncate(end);
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
