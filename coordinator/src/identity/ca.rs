//! The cluster's certificate authority and the certificates it issues.

use std::fmt;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Error, Identity, SERVER_NAME};
use crate::ids::NodeId;

/// Longest name of a cluster or node that goes into a certificate (X.520's bound for a common name).
const MAX_NAME_CHARS: usize = 64;

/// The cluster's certificate authority: with its key, whoever holds it decides who is a node.
pub struct Ca {
    cert_pem: String,
    key_pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// Makes a new authority.
    ///
    /// # Errors
    /// The name is not usable in a certificate.
    pub fn create(cluster_name: &str) -> Result<Self, Error> {
        let mut params = named(cluster_name)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(|e| Error::invalid("the new CA key", e))?;
        let cert = params
            .self_signed(&key)
            .map_err(|e| Error::invalid("the new CA certificate", e))?;
        Self::load(&cert.pem(), &key.serialize_pem())
    }

    /// Takes up an authority that was made before.
    ///
    /// # Errors
    /// Certificate or key are not PEM, or do not belong together.
    pub fn load(cert_pem: &str, key_pem: &str) -> Result<Self, Error> {
        let key = KeyPair::from_pem(key_pem).map_err(|e| Error::invalid("the CA key", e))?;
        let der = certificate(cert_pem, "the CA certificate")?;
        check_key(&der, &key, "the CA certificate")?;
        let issuer = Issuer::from_ca_cert_der(&der, key)
            .map_err(|e| Error::invalid("the CA certificate", e))?;
        Ok(Self {
            cert_pem: cert_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            der,
            issuer,
        })
    }

    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Secret: whoever reads it can make nodes.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// SHA-256 of the certificate (DER); what a joining node pins.
    pub fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }

    /// Makes key and certificate of a node in one go, for nodes that this process sets up itself.
    ///
    /// # Errors
    /// The name is not usable in a certificate.
    pub fn issue(&self, node: NodeId, name: &str) -> Result<Identity, Error> {
        let key = KeyPair::generate().map_err(|e| Error::invalid("the new node key", e))?;
        let cert = node_params(node, name)?
            .signed_by(&key, &self.issuer)
            .map_err(|e| Error::invalid("the new node certificate", e))?;
        Ok(Identity {
            node_id: node,
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
            ca_pem: self.cert_pem.clone(),
        })
    }

    /// Signs a joining node's request. Only the public key and the common name are taken from it; names and usages
    /// are ours.
    ///
    /// # Errors
    /// The request is not one, or its signature does not fit its key.
    pub fn sign_csr(&self, csr_pem: &str, node: NodeId) -> Result<String, Error> {
        let bad = |e: rcgen::Error| Error::invalid("the certificate request", e);
        let mut csr = CertificateSigningRequestParams::from_pem(csr_pem).map_err(bad)?;
        let name = match csr.params.distinguished_name.get(&DnType::CommonName) {
            Some(rcgen::DnValue::Utf8String(name)) => name.clone(),
            _ => format!("node {node}"),
        };
        csr.params = node_params(node, &name)?;
        Ok(csr.signed_by(&self.issuer).map_err(bad)?.pem())
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca")
            .field("fingerprint", &hex::encode(self.fingerprint()))
            .finish_non_exhaustive()
    }
}

/// A node's key before its certificate has come back.
pub struct PendingIdentity {
    key_pem: String,
    csr_pem: String,
}

impl PendingIdentity {
    /// Makes a key and the request for its certificate.
    ///
    /// # Errors
    /// The name is not usable in a certificate.
    pub fn new(name: &str) -> Result<Self, Error> {
        let key = KeyPair::generate().map_err(|e| Error::invalid("the new node key", e))?;
        let csr = named(name)?
            .serialize_request(&key)
            .map_err(|e| Error::invalid("the certificate request", e))?;
        let csr_pem = csr
            .pem()
            .map_err(|e| Error::invalid("the certificate request", e))?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            csr_pem,
        })
    }

    /// What [`Ca::sign_csr`] takes.
    pub fn csr_pem(&self) -> &str {
        &self.csr_pem
    }

    /// Joins the key with the certificate that came back.
    ///
    /// # Errors
    /// The certificate is for another key or another node.
    pub fn complete(self, node: NodeId, cert_pem: &str, ca_pem: &str) -> Result<Identity, Error> {
        let key =
            KeyPair::from_pem(&self.key_pem).map_err(|e| Error::invalid("the node key", e))?;
        let der = certificate(cert_pem, "the node certificate")?;
        check_key(&der, &key, "the node certificate")?;
        certificate(ca_pem, "the CA certificate")?;
        match node_id_of(&der) {
            Some(id) if id == node => {}
            other => {
                let why = format!("expected the name of node {node}, got {other:?}");
                return Err(Error::invalid("the node certificate", why));
            }
        }
        Ok(Identity {
            node_id: node,
            cert_pem: cert_pem.to_owned(),
            key_pem: self.key_pem,
            ca_pem: ca_pem.to_owned(),
        })
    }
}

/// The node whose certificate this is; `None` when it names none. Says nothing about who signed it.
pub fn node_id_of(der: &CertificateDer<'_>) -> Option<NodeId> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let names = cert.subject_alternative_name().ok()??;
    names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::DNSName(name) => {
                let id: u64 = name
                    .strip_prefix("node-")?
                    .strip_suffix(".verbund")?
                    .parse()
                    .ok()?;
                (id != 0).then_some(NodeId(id))
            }
            _ => None,
        })
}

pub(super) fn certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, Error> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| Error::invalid(what, e))
}

fn check_key(der: &CertificateDer<'_>, key: &KeyPair, what: &'static str) -> Result<(), Error> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| Error::invalid(what, e))?;
    if cert.public_key().subject_public_key.data.as_ref() == key.public_key_raw() {
        Ok(())
    } else {
        Err(Error::invalid(what, "it belongs to another key"))
    }
}

fn named(name: &str) -> Result<CertificateParams, Error> {
    let count = name.chars().count();
    if count == 0 || count > MAX_NAME_CHARS || name.chars().any(char::is_control) {
        let why = format!("expected 1 to {MAX_NAME_CHARS} printable characters, got {count}");
        return Err(Error::invalid("the name", why));
    }
    let mut params = CertificateParams::default();
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

fn node_params(node: NodeId, name: &str) -> Result<CertificateParams, Error> {
    if node.0 == 0 {
        return Err(Error::invalid("the node id", "0 is reserved"));
    }
    let mut params = named(name)?;
    for dns in [format!("node-{node}.verbund"), SERVER_NAME.to_owned()] {
        let dns = dns
            .try_into()
            .map_err(|e| Error::invalid("the node name", e))?;
        params.subject_alt_names.push(SanType::DnsName(dns));
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}
