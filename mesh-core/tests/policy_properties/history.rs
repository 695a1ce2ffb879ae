//! What happens to a mesh: nodes and people come, change and go, the policy is edited.

use std::sync::Arc;

use mesh_core::node::{NodeId, User};
use proptest::prelude::*;

use crate::scene::{Names, Nature, Rule, Scene, names, nature, rule, scene, user};

/// Several of them may happen between one compile and the next.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Join(Nature),
    Leave(usize),
    Become(usize, Nature),
    /// A value that is another, yet says the same: an endpoint changed.
    Touch(usize),
    Meet(Box<User>),
    Part(usize),
    Insert(usize, Rule),
    Edit(usize, Rule),
    /// The same rule once more.
    Repeat(usize, usize),
    Remove(usize),
    Move(usize, usize),
    Rename(Box<Names>),
    /// Nothing but a comment.
    Comment,
}

fn step() -> impl Strategy<Value = Step> {
    let at = || 0_usize..8;
    let people = (0_usize..4).prop_flat_map(user);
    prop_oneof![
        3 => nature().prop_map(Step::Join),
        2 => at().prop_map(Step::Leave),
        4 => (at(), nature()).prop_map(|(at, nature)| Step::Become(at, nature)),
        1 => at().prop_map(Step::Touch),
        2 => people.prop_map(|user| Step::Meet(Box::new(user))),
        1 => (0_usize..4).prop_map(Step::Part),
        3 => (at(), rule()).prop_map(|(at, rule)| Step::Insert(at, rule)),
        3 => (at(), rule()).prop_map(|(at, rule)| Step::Edit(at, rule)),
        1 => (at(), at()).prop_map(|(at, to)| Step::Repeat(at, to)),
        2 => at().prop_map(Step::Remove),
        2 => (at(), at()).prop_map(|(at, to)| Step::Move(at, to)),
        2 => names().prop_map(|names| Step::Rename(Box::new(names))),
        1 => Just(Step::Comment),
    ]
}

/// A scene, and what happens before each compile.
pub(crate) fn history() -> impl Strategy<Value = (Scene, Vec<Vec<Step>>)> {
    let moment = prop::collection::vec(step(), 1..4);
    (scene(), prop::collection::vec(moment, 1..8))
}

impl Step {
    pub(crate) fn apply(self, scene: &mut Scene, comments: &mut usize) {
        let nodes: Vec<NodeId> = scene.mesh.nodes.keys().copied().collect();
        let some_node = |at: usize| nodes.get(at % nodes.len().max(1)).copied();
        let rules = scene.rules.len();
        match self {
            Self::Join(nature) => {
                // Numbers and addresses are used again, so that what was kept of the last can show.
                let number = (1..).find(|number| !scene.mesh.nodes.contains_key(&NodeId(*number)));
                let number = number.unwrap();
                let owner = scene.mesh.owner("tag:a");
                let v4 = [100, 64, 0, number as u8].into();
                let v6 = format!("fd7a:115c:a1e0::{number:x}").parse().unwrap();
                let id = scene.mesh.node_called(NodeId(number), owner, v4, v6);
                nature.apply(&mut scene.mesh, id);
            }
            Self::Leave(at) => {
                if let Some(id) = some_node(at) {
                    scene.mesh.nodes.remove(&id);
                }
            }
            Self::Become(at, nature) => {
                if let Some(id) = some_node(at) {
                    nature.apply(&mut scene.mesh, id);
                }
            }
            Self::Touch(at) => {
                if let Some(id) = some_node(at) {
                    let node = Arc::make_mut(scene.mesh.nodes.get_mut(&id).unwrap());
                    node.endpoints.insert("192.0.2.1:1".parse().unwrap());
                }
            }
            Self::Meet(user) => drop(scene.mesh.users.insert(user.id, Arc::new(*user))),
            Self::Part(number) => {
                let id = mesh_core::node::UserId(number as u64 + 1);
                scene.mesh.users.remove(&id);
            }
            Self::Insert(at, rule) => scene.rules.insert(at % (rules + 1), rule),
            Self::Edit(at, rule) if rules > 0 => scene.rules[at % rules] = rule,
            Self::Repeat(at, to) if rules > 0 => {
                let rule = scene.rules[at % rules].clone();
                scene.rules.insert(to % (rules + 1), rule);
            }
            Self::Remove(at) if rules > 0 => drop(scene.rules.remove(at % rules)),
            Self::Move(at, to) if rules > 0 => {
                let rule = scene.rules.remove(at % rules);
                scene.rules.insert(to % rules, rule);
            }
            Self::Edit(..) | Self::Repeat(..) | Self::Remove(_) | Self::Move(..) => {}
            Self::Rename(names) => scene.names = *names,
            Self::Comment => *comments += 1,
        }
    }
}
