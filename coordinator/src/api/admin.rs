//! The operators' door, on a unix socket.
//!
//! Whoever may open the socket was let in by the file system; who they are is asked of the kernel
//! once more, so that a socket with too wide a mode does not hand out the mesh.

use std::path::PathBuf;
use std::sync::Arc;

use mesh_api::{Join, v1};
use mesh_core::node::{Node, Owner, UnixTime, User};
use mesh_core::world::World;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};
use tracing::info;

use super::error::status;
use crate::clock::Clock;
use crate::preauth::{self, KeyId, PreAuthKey};
use crate::registry::Refusal;
use crate::registry::admin::{self, KeyRequest};
use crate::sessions::Sessions;
use crate::store::{PolicyText, StoreError};
use crate::world::{ChangeError, Draft, Handle};

/// Who may use the admin socket besides root and the coordinator's own user.
#[derive(Debug, Clone, Default)]
pub struct Admins {
    pub own_uid: u32,
    /// A group by number, and the users that `/etc/group` lists for it.
    pub group: Option<(u32, Vec<u32>)>,
}

impl Admins {
    fn admits(&self, uid: u32, gid: u32) -> bool {
        let in_group = |(group, members): &(u32, Vec<u32>)| gid == *group || members.contains(&uid);
        uid == 0 || uid == self.own_uid || self.group.as_ref().is_some_and(in_group)
    }

    /// Lets a request in, or says why not.
    pub fn check(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let info = request.extensions().get::<UdsConnectInfo>();
        match info.and_then(|info| info.peer_cred) {
            Some(peer) if self.admits(peer.uid(), peer.gid()) => Ok(request),
            Some(peer) => Err(Status::permission_denied(format!(
                "user {} may not administer this mesh: run as root, or join the admin group",
                peer.uid()
            ))),
            None => Err(Status::permission_denied(
                "the kernel does not say who is calling",
            )),
        }
    }
}

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
        let view = self.sessions.view(node.id);
        let world = self.world.current();
        let text = |items: Vec<String>| items;
        v1::Node {
            id: node.id.0,
            name: node.name.to_string(),
            key: node.key.to_string(),
            machine: node.machine.to_string(),
            addresses: node.addresses.each().map(|a| a.to_string()).to_vec(),
            tags: node.owner.tags().map(ToString::to_string).collect(),
            user: user_name(&world.world, &node.owner),
            endpoints: text(node.endpoints.iter().map(ToString::to_string).collect()),
            advertised_routes: node
                .advertised_routes
                .iter()
                .map(ToString::to_string)
                .collect(),
            approved_routes: node
                .approved_routes
                .iter()
                .map(ToString::to_string)
                .collect(),
            ephemeral: node.ephemeral,
            created: node.created.0,
            expires: node.expires.map(|at| at.0),
            expired: node.expired,
            connected: view.connected,
            last_seen: view.last_seen.map(|at| at.0),
            applied_generation: view.applied.map(|generation| generation.0),
            apply_error: view.apply_error,
            host: Some((&node.host).into()),
        }
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
        if self.world.current().policy.is_none() {
            problems.push(
                "no policy is set: every node may reach every other; set one with \
                 `mesh-coordinator policy set FILE`"
                    .to_owned(),
            );
        }
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

    fn policy(&self, policy: &PolicyText, generation: u64) -> v1::Policy {
        v1::Policy {
            text: policy.text.clone(),
            version: policy.version,
            generation,
            changed: policy.changed.0,
        }
    }
}

fn user_name(world: &World, owner: &Owner) -> Option<String> {
    let user = world.users.get(&owner.user()?)?;
    Some(user.name.to_string())
}

fn user(user: &User) -> v1::User {
    v1::User {
        id: user.id.0,
        name: user.name.to_string(),
        display_name: user.display_name.clone(),
        created: user.created.0,
    }
}

fn key(world: &World, key: &PreAuthKey) -> v1::PreAuthKey {
    v1::PreAuthKey {
        id: key.id.0,
        prefix: key.prefix.clone(),
        reusable: key.reusable,
        ephemeral: key.ephemeral,
        tags: key.owner.tags().map(ToString::to_string).collect(),
        user: user_name(world, &key.owner),
        created: key.created.0,
        expires: key.expires.0,
        revoked: key.revoked,
        uses: key.uses,
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

    // === users ===

    async fn create_user(&self, request: Request<v1::CreateUserRequest>) -> Answer<v1::User> {
        let v1::CreateUserRequest { name, display_name } = request.into_inner();
        let made = self
            .change(move |draft| admin::create_user(draft, &name, &display_name))
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

    async fn get_policy(&self, _: Request<v1::Empty>) -> Answer<v1::Policy> {
        let current = self.world.current();
        let unset = PolicyText {
            version: 0,
            text: mesh_core::policy::ALLOW_ALL.to_owned(),
            changed: UnixTime(0),
        };
        let policy = current.policy.as_deref().unwrap_or(&unset);
        Ok(Response::new(
            self.policy(policy, current.world.generation.0),
        ))
    }

    async fn set_policy(&self, request: Request<v1::SetPolicyRequest>) -> Answer<v1::Policy> {
        let v1::SetPolicyRequest {
            text,
            file,
            expect_version,
        } = request.into_inner();
        let file = file_name(file);
        let policy: Arc<PolicyText> = self
            .change(move |draft| admin::set_policy(draft, text, &file, expect_version))
            .await?;
        info!(version = policy.version, "policy set");
        let generation = self.world.current().world.generation.0;
        Ok(Response::new(self.policy(&policy, generation)))
    }

    async fn check_policy(
        &self,
        request: Request<v1::CheckPolicyRequest>,
    ) -> Answer<v1::CheckPolicyResponse> {
        let v1::CheckPolicyRequest { text, file } = request.into_inner();
        let current = self.world.current();
        let problems = match admin::check_policy(&current.world, &text, &file_name(file)) {
            Ok(_) => Vec::new(),
            Err(problems) => problems
                .iter()
                .map(|problem| v1::PolicyProblem {
                    line: problem.line,
                    column: problem.column,
                    message: problem.message.clone(),
                })
                .collect(),
        };
        Ok(Response::new(v1::CheckPolicyResponse { problems }))
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

/// The name that stands before line and column in an error.
fn file_name(file: String) -> String {
    let printable: String = file.chars().filter(|c| !c.is_control()).take(256).collect();
    if printable.is_empty() {
        "policy".to_owned()
    } else {
        printable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_ourselves_and_the_group_are_admins() {
        let admins = Admins {
            own_uid: 990,
            group: Some((50, vec![1000])),
        };
        assert!(admins.admits(0, 0));
        assert!(admins.admits(990, 990));
        assert!(admins.admits(1001, 50));
        assert!(admins.admits(1000, 1000));
        assert!(!admins.admits(1001, 1001));
        assert!(!Admins::default().admits(1000, 50));
    }
}
