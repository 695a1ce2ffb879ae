//! The operators' door, on a unix socket.
//!
//! Whoever may open the socket was let in by the file system; who they are is asked of the kernel
//! once more, so that a socket with too wide a mode does not hand out the mesh.

use std::path::PathBuf;

use mesh_api::{Join, v1};
use mesh_core::node::{AttributeValue, Node};
use tonic::{Request, Response, Status};
use tracing::info;

use super::error::status;
use super::policy;
use super::text::file_name;
use crate::clock::Clock;
use crate::preauth::{self, KeyId};
use crate::registry::Refusal;
use crate::registry::admin::{self, KeyRequest, NewPolicy, UserChange};
use crate::sessions::Sessions;
use crate::store::{PolicyText, StoreError};
use crate::world::{ChangeError, Draft, Handle};

mod caller;
mod shown;

pub use caller::Admins;

use caller::author;
use shown::{key, user};

#[derive(Debug)]
pub struct Admin {
    pub world: Handle,
    pub sessions: Sessions,
    pub clock: Clock,
    /// Join strings, the preferred address first.
    pub joins: Vec<Join>,
    pub state_dir: PathBuf,
}

/// Below this much free space the status warns.
const LOW_SPACE: u64 = 64 * 1024 * 1024;

impl Admin {
    async fn change<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&mut Draft) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        self.world.change(decide).await.map_err(status)
    }

    fn node(&self, node: &Node) -> v1::Node {
        let world = self.world.current();
        shown::node(node, &world.world, self.sessions.view(node.id))
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(trouble) = self.world.trouble() {
            problems.push(format!("no change can be made: {trouble}"));
        }
        if let Some((node, generation)) = self.sessions.ahead() {
            problems.push(format!(
                "node {node} holds generation {generation}, newer than this database: it is an old \
                 copy; restore it with `mesh-coordinator db restore` so that nodes follow it"
            ));
        }
        let current = self.world.current();
        if current.policy.is_none() {
            problems.push(
                "no policy is set: every node may reach every other; set one with \
                 `mesh-coordinator policy set FILE`"
                    .to_owned(),
            );
        }
        problems.extend(current.document.open().map(str::to_owned));
        if self.clock.jumped() {
            problems.push(
                "the wall clock was moved by more than a minute since the start; restart to \
                 follow it"
                    .to_owned(),
            );
        }
        if let Ok(fs) = rustix::fs::statvfs(&self.state_dir) {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            if free < LOW_SPACE {
                let kib = free / 1024;
                problems.push(format!("only {kib} KiB are free under the database"));
            }
        }
        problems
    }

    /// The policy in force; without a version where nobody has set one.
    fn policy_in_force(&self) -> v1::Policy {
        let current = self.world.current();
        let unset = PolicyText {
            text: mesh_core::policy::ALLOW_ALL.to_owned(),
            ..PolicyText::default()
        };
        let policy = current.policy.as_deref().unwrap_or(&unset);
        shown::policy(policy, current.world.generation.0)
    }

    /// One that was in force before.
    async fn policy_before(&self, version: u64) -> Result<PolicyText, Status> {
        let found = self.world.policy(version).await.map_err(|error| match error {
            // Not what is in force, and its text is the operator's own: all is said.
            ChangeError::Store(StoreError::Damaged(what)) => Status::data_loss(format!(
                "policy version {version} is damaged in the database: {what}; the one in force is \
                 not touched by it. Set the text again from your own copy, or put a backup from \
                 before back with `mesh-coordinator db restore FILE`"
            )),
            error => status(error),
        })?;
        found.ok_or_else(|| {
            Status::not_found(format!(
                "policy version {version} is not kept; `mesh-coordinator policy history` shows those that are"
            ))
        })
    }

    async fn put_policy(&self, new: NewPolicy) -> Answer<v1::Policy> {
        policy::fits(self.world.current(), new.text.clone(), new.file.clone()).await?;
        let policy = self
            .change(move |draft| admin::set_policy(draft, new))
            .await?;
        info!(
            version = policy.version,
            author = policy.author,
            "policy set"
        );
        let generation = self.world.current().world.generation.0;
        Ok(Response::new(shown::policy(&policy, generation)))
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::admin_server::Admin for Admin {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Answer<v1::CoordinatorStatus> {
        let current = self.world.current();
        Ok(Response::new(v1::CoordinatorStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mesh: Some(current.world.mesh.as_ref().into()),
            epoch: current.world.epoch.0,
            generation: current.world.generation.0,
            nodes: current.world.nodes.len() as u64,
            connected: self.sessions.connected() as u64,
            join: self
                .joins
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
            problems: self.problems(),
        }))
    }

    // === nodes ===

    async fn list_nodes(&self, _: Request<v1::ListNodesRequest>) -> Answer<v1::ListNodesResponse> {
        let current = self.world.current();
        Ok(Response::new(v1::ListNodesResponse {
            nodes: current
                .world
                .nodes
                .values()
                .map(|node| self.node(node))
                .collect(),
            generation: current.world.generation.0,
        }))
    }

    async fn get_node(&self, request: Request<v1::NodeRef>) -> Answer<v1::Node> {
        let current = self.world.current();
        let node = admin::find_node(&current.world, &request.get_ref().node);
        let node = node.map_err(|refusal| status(ChangeError::Refused(refusal)))?;
        Ok(Response::new(self.node(&node)))
    }

    async fn rename_node(&self, request: Request<v1::RenameNodeRequest>) -> Answer<v1::Node> {
        let v1::RenameNodeRequest { node, name } = request.into_inner();
        let node = self
            .change(move |draft| admin::rename_node(draft, &node, &name))
            .await?;
        info!(node = %node.id, "node renamed");
        Ok(Response::new(self.node(&node)))
    }

    async fn tag_node(&self, request: Request<v1::TagNodeRequest>) -> Answer<v1::Node> {
        let v1::TagNodeRequest { node, tags } = request.into_inner();
        let node = self
            .change(move |draft| admin::tag_node(draft, &node, &tags))
            .await?;
        info!(node = %node.id, "node tagged");
        Ok(Response::new(self.node(&node)))
    }

    async fn approve_routes(&self, request: Request<v1::ApproveRoutesRequest>) -> Answer<v1::Node> {
        let v1::ApproveRoutesRequest { node, routes } = request.into_inner();
        let node = self
            .change(move |draft| admin::approve_routes(draft, &node, &routes))
            .await?;
        info!(node = %node.id, "routes approved");
        Ok(Response::new(self.node(&node)))
    }

    async fn expire_node(&self, request: Request<v1::NodeRef>) -> Answer<v1::Node> {
        let v1::NodeRef { node } = request.into_inner();
        let node = self
            .change(move |draft| admin::expire_node(draft, &node))
            .await?;
        info!(node = %node.id, "node expired");
        Ok(Response::new(self.node(&node)))
    }

    async fn delete_node(&self, request: Request<v1::NodeRef>) -> Answer<v1::Empty> {
        let v1::NodeRef { node } = request.into_inner();
        let node = self
            .change(move |draft| admin::delete_node(draft, &node))
            .await?;
        info!(node = %node.id, "node deleted");
        Ok(Response::new(v1::Empty {}))
    }

    async fn set_node_attribute(
        &self,
        request: Request<v1::SetNodeAttributeRequest>,
    ) -> Answer<v1::Node> {
        let v1::SetNodeAttributeRequest { node, attribute } = request.into_inner();
        let v1::Attribute { name, value } = attribute.unwrap_or_default();
        let value = value.map(|value| match value {
            v1::attribute::Value::Text(text) => AttributeValue::Text(text),
            v1::attribute::Value::Number(number) => AttributeValue::Number(number),
            v1::attribute::Value::Flag(flag) => AttributeValue::Bool(flag),
        });
        let node = self
            .change(move |draft| admin::set_attribute(draft, &node, &name, value))
            .await?;
        info!(node = %node.id, "node attribute set");
        Ok(Response::new(self.node(&node)))
    }

    // === users ===

    async fn create_user(&self, request: Request<v1::CreateUserRequest>) -> Answer<v1::User> {
        let v1::CreateUserRequest {
            name,
            display_name,
            role,
        } = request.into_inner();
        let made = self
            .change(move |draft| admin::create_user(draft, &name, &display_name, &role))
            .await?;
        info!(user = %made.id, "user created");
        Ok(Response::new(user(&made)))
    }

    async fn list_users(&self, _: Request<v1::Empty>) -> Answer<v1::ListUsersResponse> {
        let current = self.world.current();
        let users = current.world.users.values().map(|each| user(each));
        Ok(Response::new(v1::ListUsersResponse {
            users: users.collect(),
        }))
    }

    async fn rename_user(&self, request: Request<v1::RenameUserRequest>) -> Answer<v1::User> {
        let v1::RenameUserRequest { user: old, name } = request.into_inner();
        let renamed = self
            .change(move |draft| admin::rename_user(draft, &old, &name))
            .await?;
        info!(user = %renamed.id, "user renamed");
        Ok(Response::new(user(&renamed)))
    }

    async fn set_user(&self, request: Request<v1::SetUserRequest>) -> Answer<v1::User> {
        let v1::SetUserRequest {
            user: name,
            role,
            idp_groups,
            display_name,
        } = request.into_inner();
        let change = UserChange {
            role,
            idp_groups: idp_groups.map(|groups| groups.names),
            display_name,
        };
        let set = self
            .change(move |draft| admin::set_user(draft, &name, change))
            .await?;
        info!(user = %set.id, role = %set.role, "user set");
        Ok(Response::new(user(&set)))
    }

    async fn delete_user(&self, request: Request<v1::UserRef>) -> Answer<v1::Empty> {
        let v1::UserRef { user } = request.into_inner();
        self.change(move |draft| admin::delete_user(draft, &user))
            .await?;
        info!("user deleted");
        Ok(Response::new(v1::Empty {}))
    }

    // === pre-auth keys ===

    async fn create_key(&self, request: Request<v1::CreateKeyRequest>) -> Answer<v1::CreatedKey> {
        let asked = request.into_inner();
        let (prefix, hash, secret) = preauth::generate();
        let request = KeyRequest {
            prefix,
            hash,
            reusable: asked.reusable,
            ephemeral: asked.ephemeral,
            lifetime: asked.expires_in_seconds,
            tags: asked.tags,
            user: asked.user,
        };
        let made = self
            .change(move |draft| admin::create_key(draft, request))
            .await?;
        info!(key = made.prefix, "pre-auth key created");
        Ok(Response::new(v1::CreatedKey {
            key: Some(key(&self.world.current().world, &made)),
            secret: secret.to_string(),
        }))
    }

    async fn list_keys(&self, _: Request<v1::Empty>) -> Answer<v1::ListKeysResponse> {
        let current = self.world.current();
        let keys = current.keys.values().map(|each| key(&current.world, each));
        Ok(Response::new(v1::ListKeysResponse {
            keys: keys.collect(),
        }))
    }

    async fn revoke_key(&self, request: Request<v1::KeyRef>) -> Answer<v1::PreAuthKey> {
        let id = KeyId(request.get_ref().id);
        let revoked = self
            .change(move |draft| admin::revoke_key(draft, id))
            .await?;
        info!(key = revoked.prefix, "pre-auth key revoked");
        Ok(Response::new(key(&self.world.current().world, &revoked)))
    }

    // === policy ===

    async fn get_policy(&self, request: Request<v1::GetPolicyRequest>) -> Answer<v1::Policy> {
        let in_force = self.policy_in_force();
        Ok(Response::new(match request.get_ref().version {
            Some(version) if version != in_force.version => {
                shown::policy(&self.policy_before(version).await?, 0)
            }
            _ => in_force,
        }))
    }

    async fn set_policy(&self, request: Request<v1::SetPolicyRequest>) -> Answer<v1::Policy> {
        let author = author(&request, request.get_ref().author.as_deref());
        let v1::SetPolicyRequest {
            text,
            file,
            expect_version,
            author: _,
        } = request.into_inner();
        self.put_policy(NewPolicy {
            text,
            file: file_name(&file),
            author,
            expect: expect_version,
        })
        .await
    }

    async fn list_policies(&self, _: Request<v1::Empty>) -> Answer<v1::ListPoliciesResponse> {
        let mut policies = Vec::new();
        let in_force = self.policy_in_force();
        if in_force.version > 0 {
            policies.push(v1::Policy {
                text: String::new(),
                ..in_force
            });
        }
        let before = self.world.policies().await.map_err(status)?;
        policies.extend(before.iter().map(|policy| shown::policy(policy, 0)));
        Ok(Response::new(v1::ListPoliciesResponse { policies }))
    }

    async fn rollback_policy(
        &self,
        request: Request<v1::RollbackPolicyRequest>,
    ) -> Answer<v1::Policy> {
        let author = author(&request, request.get_ref().author.as_deref());
        let in_force = self.policy_in_force().version;
        let version = request.get_ref().version;
        if version == in_force {
            return Err(Status::failed_precondition(format!(
                "policy version {version} is the one in force"
            )));
        }
        let before = self.policy_before(version).await?;
        self.put_policy(NewPolicy {
            text: before.text,
            file: before.file,
            author,
            expect: Some(in_force),
        })
        .await
    }

    async fn ask_policy(&self, request: Request<v1::PolicyQuestion>) -> Answer<v1::PolicyAnswer> {
        let answer = policy::ask(self.world.current(), request.into_inner());
        Ok(Response::new(answer.await?))
    }

    async fn diff_policy(
        &self,
        request: Request<v1::DiffPolicyRequest>,
    ) -> Answer<v1::PolicyAnswer> {
        let answer = policy::diff(self.world.current(), request.into_inner());
        Ok(Response::new(answer.await?))
    }

    async fn check_policy(
        &self,
        request: Request<v1::CheckPolicyRequest>,
    ) -> Answer<v1::CheckPolicyResponse> {
        let v1::CheckPolicyRequest { text, file } = request.into_inner();
        let current = self.world.current();
        let checked =
            tokio::task::spawn_blocking(move || policy::check(&current, &text, &file_name(&file)));
        let checked = checked.await;
        checked
            .map(Response::new)
            .map_err(|_| Status::internal("the policy could not be checked"))
    }

    async fn backup(&self, request: Request<v1::BackupRequest>) -> Answer<v1::BackupResponse> {
        let path = PathBuf::from(request.into_inner().path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument("the path of a backup is absolute"));
        }
        if path.exists() {
            let path = path.display();
            return Err(Status::already_exists(format!(
                "{path} exists; name another file"
            )));
        }
        let made = self.world.backup(path).await;
        let (bytes, generation) = made.map_err(|error| match error {
            // The file is the operator's business, so the operator is told all.
            ChangeError::Store(error @ StoreError::Failed(_)) => {
                Status::failed_precondition(format!(
                    "{error}; the coordinator writes the copy as its own user: is the directory \
                     one that it may write to?"
                ))
            }
            error => status(error),
        })?;
        info!(bytes, "database backed up");
        Ok(Response::new(v1::BackupResponse {
            bytes,
            generation: generation.0,
        }))
    }
}
