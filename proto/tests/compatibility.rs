//! The wire contract is one that earlier minor versions speak: nothing of theirs is gone, renumbered, or another type.
//!
//! `compatibility/VERSION.bin` are the descriptors of a released version, without sources:
//! `cd proto/idl && protoc -I . --descriptor_set_out=../tests/compatibility/VERSION.bin $(find shardfs -name '*.proto' | sort)`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};
use shardfs_proto::wire;

const RELEASED: [(&str, &[u8]); 1] = [("0.1.0", include_bytes!("compatibility/0.1.0.bin"))];

/// What a contract says, by full name: each entry stays as it is in later versions.
type Contract = BTreeMap<String, String>;

fn contract(set: &FileDescriptorSet) -> Contract {
    let mut contract = Contract::new();
    for file in &set.file {
        let package = file.package();
        for message in &file.message_type {
            add_message(&mut contract, package, message);
        }
        for choices in &file.enum_type {
            add_enum(&mut contract, package, choices);
        }
        for service in &file.service {
            for method in &service.method {
                let streams = |streams: bool| if streams { "stream " } else { "" };
                let said = format!(
                    "({}{}) returns ({}{})",
                    streams(method.client_streaming()),
                    method.input_type(),
                    streams(method.server_streaming()),
                    method.output_type()
                );
                contract.insert(format!("method {package}.{}/{}", service.name(), method.name()), said);
            }
        }
    }
    contract
}

fn add_message(contract: &mut Contract, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    contract.insert(format!("message {name}"), String::new());
    for field in &message.field {
        contract.insert(format!("field {name} = {}", field.number()), described(message, field));
    }
    for inner in &message.nested_type {
        add_message(contract, &name, inner);
    }
    for choices in &message.enum_type {
        add_enum(contract, &name, choices);
    }
}

/// All that decides how a field is encoded, and its name, which stands in JSON and in programs.
fn described(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let oneof = field.oneof_index.map(|at| message.oneof_decl[at as usize].name().to_owned());
    let oneof = oneof.filter(|_| !field.proto3_optional()).unwrap_or_default();
    let packed = field.options.as_ref().and_then(|options| options.packed);
    format!(
        "{:?} {:?} {} {}, optional: {}, oneof: {oneof:?}, packed: {packed:?}",
        field.label(),
        field.r#type(),
        field.type_name(),
        field.name(),
        field.proto3_optional(),
    )
}

fn add_enum(contract: &mut Contract, scope: &str, choices: &EnumDescriptorProto) {
    for value in &choices.value {
        let name = format!("enum {scope}.{} = {}", choices.name(), value.number());
        contract.insert(name, value.name().to_owned());
    }
}

/// What of `before` is missing, or another, in `now`.
fn broken(before: &Contract, now: &Contract) -> Vec<String> {
    let differs = |(what, said): (&String, &String)| match now.get(what) {
        Some(there) if there == said => None,
        Some(there) => Some(format!("{what}: was {said}, is {there}")),
        None => Some(format!("{what}: was {said}, is gone")),
    };
    before.iter().filter_map(differs).collect()
}

fn now() -> FileDescriptorSet {
    FileDescriptorSet::decode(wire::FILE_DESCRIPTOR_SET).unwrap()
}

#[test]
fn nothing_of_a_released_version_has_changed() {
    let now = contract(&now());
    for (version, released) in RELEASED {
        let before = contract(&FileDescriptorSet::decode(released).unwrap());
        assert!(before.len() > 500 && before.contains_key("method shardfs.v1.Storage/Put"), "{version}");
        let broken = broken(&before, &now);
        assert!(broken.is_empty(), "not what {version} speaks:\n{}", broken.join("\n"));
    }
}

/// The comparison sees every kind of change that it is there for.
#[test]
fn every_kind_of_change_is_seen() {
    let before = contract(&now());
    type Change = fn(&mut FileDescriptorSet);
    fn message<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
        let mut all = set.file.iter_mut().flat_map(|file| &mut file.message_type);
        all.find(|message| message.name() == name).unwrap()
    }
    fn service<'a>(
        set: &'a mut FileDescriptorSet,
        name: &str,
    ) -> &'a mut prost_types::ServiceDescriptorProto {
        let mut all = set.file.iter_mut().flat_map(|file| &mut file.service);
        all.find(|service| service.name() == name).unwrap()
    }
    fn reasons(set: &mut FileDescriptorSet) -> &mut EnumDescriptorProto {
        let mut all = set.file.iter_mut().flat_map(|file| &mut file.enum_type);
        all.find(|choices| choices.name() == "ErrorReason").unwrap()
    }
    let changes: [(&str, Change); 13] = [
        ("a message is gone", |set| {
            set.file.iter_mut().for_each(|file| file.message_type.retain(|m| m.name() != "GetRequest"));
        }),
        ("a field is gone", |set| drop(message(set, "GetRequest").field.pop())),
        ("a field has another number", |set| message(set, "GetRequest").field[0].number = Some(999)),
        ("a field has another name", |set| message(set, "GetRequest").field[0].name = Some("x".into())),
        ("a field has another type", |set| message(set, "PutRequest").field[1].set_type(Type::Fixed64)),
        ("a field is of another message", |set| {
            message(set, "GetRequest").field[0].type_name = Some(".shardfs.v1.Time".into());
        }),
        ("a field is repeated", |set| message(set, "GetRequest").field[0].set_label(Label::Repeated)),
        ("a field says whether it is there", |set| {
            message(set, "GetRequest").field[0].proto3_optional = Some(true);
        }),
        ("a service is gone", |set| {
            set.file.iter_mut().for_each(|file| file.service.retain(|s| s.name() != "Storage"));
        }),
        ("a method is gone", |set| drop(service(set, "Storage").method.pop())),
        ("a method streams", |set| service(set, "Storage").method[0].server_streaming = Some(true)),
        ("a method takes something else", |set| {
            service(set, "Storage").method[0].input_type = Some(".shardfs.v1.Time".into());
        }),
        ("a choice has another number", |set| reasons(set).value[3].number = Some(999)),
    ];
    assert!(broken(&before, &before).is_empty());
    for (what, change) in changes {
        let mut changed = now();
        change(&mut changed);
        assert!(!broken(&before, &contract(&changed)).is_empty(), "{what}");
    }
    // What is added breaks nothing.
    let mut more = now();
    let mut field = message(&mut more, "GetRequest").field[0].clone();
    (field.name, field.number) = (Some("later".into()), Some(999));
    message(&mut more, "GetRequest").field.push(field);
    assert!(broken(&before, &contract(&more)).is_empty());
}
